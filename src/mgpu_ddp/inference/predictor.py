"""Model input → columns of rows, on the model's device. Splits batches that do not fit into memory."""

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mgpu_ddp.config.resolved import Resolved
from mgpu_ddp.config.schema import Config
from mgpu_ddp.distributed.host import is_out_of_memory
from mgpu_ddp.errors import OutOfMemoryError, UsageError
from mgpu_ddp.inference.cuda_graph import Replayed
from mgpu_ddp.inference.gpu_input import GpuInput
from mgpu_ddp.inference.outputs import SPLIT, Columns, join, to_columns
from mgpu_ddp.models.head import head_of
from mgpu_ddp.models.prepare import DTYPES, input_dtype

log = logging.getLogger("mgpu_ddp")

ALIGNMENT = 512
"""Bytes that the memory of a tensor of its own is aligned to on a GPU."""
NONFINITE = "NonFiniteError: the model's outputs for this image hold NaN or Inf"


Step = Callable[[torch.Tensor, int], Columns]
"""Takes images of one or more batches, and the batch size."""


class Predictor:
    """Normalise, run the model and keep only what the rows need, all on the model's device."""

    def __init__(
        self,
        module: nn.Module,
        config: Config,
        resolved: Resolved,
        device: torch.device,
        *,
        num_classes: int | None = None,
        outputs: Callable[[Any], Any] | None = None,
    ) -> None:
        """`num_classes` tells the head, whose input is the embedding; `outputs` is applied to what forward returns."""
        runtime, transform = config.runtime, resolved.transform
        self._module, self._transform, self._device = module, transform, device
        self._outputs, self._config = outputs, config.output
        self._dtype, self._channels_last = input_dtype(resolved), runtime.channels_last
        self._autocast = DTYPES[resolved.precision] if resolved.speedups.autocast else None
        self.decodes = resolved.on_gpu
        """Batches may come with encoded images."""
        self.inputs = (
            GpuInput(
                transform, device, self._dtype, channels_last=self._channels_last, exact=resolved.decode == "exact"
            )
            if device.type == "cuda"
            else None
        )
        self.streams, self.serial = resolved.speedups.streams, resolved.speedups.serial
        self._splits = runtime.on_oom != "raise"
        # DataParallel's threads cannot be recorded.
        graphs = resolved.speedups.graphs and config.strategy == "ddp"
        self._step: Step = self._predict
        if graphs and device.type == "cuda":
            self._step = Replayed(self._predict)
        self._kept = threading.local()
        if "embedding" in config.output.computed and num_classes is not None:
            head = head_of(module, num_classes)
            if head is None:
                rule = "without embedding for a model that has no linear or convolutional layer"
                raise UsageError(f"output.fields must be {rule}, got {[*config.output.fields]}. Leave it out.")
            head.register_forward_pre_hook(self._keep_embedding)

    @staticmethod
    def depends_on(config: Config, resolved: Resolved, device: torch.device) -> Any:
        """All values that tell one predictor from another."""
        output = config.output
        chosen = replace(config.runtime, precision=resolved.precision, decode=resolved.decode, compile=resolved.compile)
        return [
            *(config.model, config.seed, chosen, config.strategy, resolved.transform, resolved.speedups, device),
            *(config.data.name, output.format, output.fields, output.topk, output.dtype),
        ]

    def _keep_embedding(self, _head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        features = inputs[0]
        self._kept.embedding = features.mean(dim=(2, 3)) if features.dim() == 4 else features

    def __call__(self, pixels: torch.Tensor, batch_size: int) -> Columns:
        """Predict pixels, or what `GpuInput` made of them, as batches of this size, one after the other.

        Returns columns as `Rows` has them, also `finite` bool (rows,), and `split` of the same shape where a batch was
        halved, perhaps more than once, for lack of memory.

        Raises:
            OutOfMemoryError: there is no memory for a batch, and batches must not be split.
        """
        columns = self._attempt(self._step, pixels, batch_size)
        if isinstance(columns, RuntimeError):
            # One by one, because a graph of several holds more memory, and without one: its columns hold until it is
            # replayed again.
            columns = join([self._predict_alone(batch) for batch in pixels.split(batch_size)])
        return columns

    def _predict_alone(self, pixels: torch.Tensor) -> Columns:
        columns = self._attempt(self._predict, pixels, len(pixels))
        is_split = isinstance(columns, RuntimeError)
        if isinstance(columns, RuntimeError):
            columns = self._in_halves(pixels, columns)
            log.warning("a batch of %d did not fit into memory and was split: lower batch_size", len(pixels))
        columns[SPLIT] = torch.full((len(pixels),), is_split)
        return columns

    def _attempt(self, step: Step, pixels: torch.Tensor, batch_size: int) -> Columns | RuntimeError:
        try:
            with torch.inference_mode():
                return step(pixels, batch_size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # Its traceback would keep what did not fit.
            return error.with_traceback(None)

    def _in_halves(self, pixels: torch.Tensor, lack: RuntimeError) -> Columns:
        if len(pixels) == 1 or not self._splits:
            raise OutOfMemoryError.of("batch_size", len(pixels), lack) from None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        parts = []
        for half in pixels.split(-(-len(pixels) // 2)):
            found = self._attempt(self._predict, half, len(half))
            parts.append(self._in_halves(half, found) if isinstance(found, RuntimeError) else found)
        return join(parts)

    def _predict(self, pixels: torch.Tensor, batch_size: int) -> Columns:
        parts = [self._predict_batch(batch) for batch in pixels.split(batch_size)]
        return parts[0] if len(parts) == 1 else join(parts)

    def _predict_batch(self, pixels: torch.Tensor) -> Columns:
        # A convolution's kernel, and with it the last bits, may depend on how its input is aligned.
        pixels = pixels if pixels.data_ptr() % ALIGNMENT == 0 or not pixels.is_cuda else pixels.clone()
        images = pixels
        if self.inputs is None or pixels.dtype == torch.uint8:
            images = self._transform.normalise(pixels, dtype=self._dtype, channels_last=self._channels_last)
        with torch.autocast(self._device.type, self._autocast, enabled=self._autocast is not None):
            returned = self._module(images)
            if self._outputs is not None:
                returned = self._outputs(returned)
        return to_columns(returned, len(images), self._config, getattr(self._kept, "embedding", None))
