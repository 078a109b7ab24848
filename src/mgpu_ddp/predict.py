"""The loop and its clock: batches → model → rows, with nothing collective in it."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from mgpu_ddp.config import OutputConfig, RuntimeConfig
from mgpu_ddp.loading import Batch
from mgpu_ddp.models import DTYPES, head_of, precision_of
from mgpu_ddp.preprocess import Transform
from mgpu_ddp.rows import Rows
from mgpu_ddp.world import World

log = logging.getLogger("mgpu_ddp")

Columns = dict[str, torch.Tensor]
NONFINITE = "NonFiniteError: the model's outputs for this image hold NaN or Inf"


class Predictor:
    """Normalise, run the model and keep only what the rows need, all on the model's device."""

    def __init__(
        self,
        module: nn.Module,
        transform: Transform,
        runtime: RuntimeConfig,
        output: OutputConfig,
        device: torch.device,
    ) -> None:
        self._module, self._transform, self._device = module, transform, device
        self._dtype, self._channels_last = DTYPES[precision_of(runtime, device)], runtime.channels_last
        # An array of logits is the tutorial's result: that format fixes the field.
        self._fields, self._topk = {"logits"} if output.format == "npy" else set(output.fields), output.topk
        self._kept = threading.local()
        if "embedding" in self._fields:
            head_of(module).register_forward_pre_hook(self._keep_embedding)

    def _keep_embedding(self, _head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        features = inputs[0]
        self._kept.embedding = features.mean(dim=(2, 3)) if features.dim() == 4 else features

    def __call__(self, pixels: torch.Tensor) -> Columns:
        """Predict uint8 (batch_size, height, width, 3): columns as `Rows` has them, on the device.

        Also `finite` bool (batch_size,), and `split` of the same shape where the batch was halved, maybe more
        than once, because the device lacked the memory for it.
        """
        columns = self._attempt(pixels)
        if columns is None:
            log.warning("a batch of %d did not fit in memory and was split: lower batch_size", len(pixels))
            columns = self._in_halves(pixels)
            columns["split"] = torch.ones(len(pixels), dtype=torch.bool)
        return columns

    def _attempt(self, pixels: torch.Tensor) -> Columns | None:
        try:
            return self._predict(pixels)
        except RuntimeError as error:
            if len(pixels) == 1 or not _is_out_of_memory(error):
                raise
        return None

    def _in_halves(self, pixels: torch.Tensor) -> Columns:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        halves = pixels.split(-(-len(pixels) // 2))
        parts = [self._attempt(half) or self._in_halves(half) for half in halves]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @torch.inference_mode()
    def _predict(self, pixels: torch.Tensor) -> Columns:
        images = self._transform.normalise(
            pixels.to(self._device, non_blocking=True), dtype=self._dtype, channels_last=self._channels_last
        )
        logits = self._module(images).float()
        probs = logits.softmax(dim=1)
        top = probs.topk(min(self._topk, probs.shape[1]), dim=1)
        columns = {
            "pred": top.indices[:, 0].int(),
            "prob": top.values[:, 0],
            "finite": logits.isfinite().all(dim=1),
        }
        if "topk" in self._fields:
            columns |= {"topk_index": top.indices.int(), "topk_prob": top.values}
        if "logits" in self._fields:
            columns["logits"] = logits
        if "probs" in self._fields:
            columns["probs"] = probs
        if "embedding" in self._fields:
            columns["embedding"] = self._kept.embedding.float()
        return columns


@dataclass(slots=True)
class Clock:
    """Where one rank's time went, in seconds of wall time of its main thread unless said otherwise."""

    warm_up: int
    """Batches that the steady rate leaves out: the first of each that run side by side."""
    started: float = field(default_factory=time.perf_counter)
    wait_s: float = 0.0
    """Waiting for the loader."""
    predict_s: float = 0.0
    """Preprocessing and forward; on CUDA until the result is on the host."""
    peers_s: float = 0.0
    """Waiting for the windows of all ranks."""
    gather_s: float = 0.0
    """Of the collecting thread: gathering, waiting for slower ranks included."""
    write_s: float = 0.0
    """Of the collecting thread: writing and listing parts."""
    workers_s: dict[str, float] = field(default_factory=dict)
    """Seconds of loader workers, per stage."""
    batch_s: list[float] = field(default_factory=list)
    rows: int = 0
    errors: int = 0
    nonfinite: int = 0
    """Rows whose outputs held NaN or Inf; they count as errors."""
    split_rows: int = 0
    """Rows whose batch was split for lack of memory."""
    first_at: float = 0.0
    ended: float = 0.0
    _warm_at: float = 0.0
    _warm_rows: int = 0

    def batch(self, rows: int, workers: dict[str, float]) -> None:
        now = time.perf_counter()
        if not self.batch_s:
            self.first_at = now
        if len(self.batch_s) < self.warm_up:
            self._warm_at, self._warm_rows = now, self.rows + rows
        self.batch_s.append(now - (self.ended or self.started))
        self.rows += rows
        self.ended = now
        for stage, seconds in workers.items():
            self.workers_s[stage] = self.workers_s.get(stage, 0.0) + seconds

    @property
    def steady(self) -> tuple[int, float]:
        """Rows after warming up and the seconds they took; all of them where there were no more."""
        if self.rows > self._warm_rows:
            return self.rows - self._warm_rows, self.ended - self._warm_at
        return self.rows, max(self.ended - self.started, 0.0)


def in_flight(world: World) -> int:
    """Batches handed to the device before the first one's result is awaited, so that it never runs dry."""
    return 2 if world.device.type == "cuda" else world.share_of_cpus + 1


def predict(
    batches: Iterable[tuple[Batch, float]], predictor: Predictor, world: World, clock: Clock
) -> Generator[Rows]:
    """Predict batches in order, a few at a time.

    On the CPU each batch runs in one thread of its own: kernels split over several threads would add up in
    another order, and the bits of a row would depend on how many cores its rank happened to have.
    """
    pending: deque[tuple[Batch, Callable[[], Columns]]] = deque()
    depth = in_flight(world)
    with ThreadPoolExecutor(world.share_of_cpus, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for batch, waited_s in batches:
            clock.wait_s += waited_s
            started = time.perf_counter()
            if world.device.type == "cuda":
                pending.append((batch, _copy_to_host(predictor(batch.pixels))))
            else:
                pending.append((batch, pool.submit(predictor, batch.pixels).result))
            rows = _harvest(pending, clock) if len(pending) >= depth else None
            clock.predict_s += time.perf_counter() - started
            if rows is not None:
                yield rows
        while pending:
            started = time.perf_counter()
            rows = _harvest(pending, clock)
            clock.predict_s += time.perf_counter() - started
            yield rows


def _copy_to_host(columns: Columns) -> Callable[[], Columns]:
    """Start copying to the host; the returned call waits for the copy."""
    copies = {name: column.to("cpu", non_blocking=True) for name, column in columns.items()}
    copied = torch.cuda.Event()
    copied.record()

    def finish() -> Columns:
        copied.synchronize()
        return copies

    return finish


def _harvest(pending: deque[tuple[Batch, Callable[[], Columns]]], clock: Clock) -> Rows:
    batch, finish = pending.popleft()
    n = len(batch.index)
    # Copies, so that rows do not keep the padded buffers alive.
    columns = {name: np.array(column.numpy()[:n]) for name, column in finish().items()}
    nonfinite = {i: NONFINITE for i in batch.index[~columns.pop("finite")].tolist() if i not in batch.errors}
    split = frozenset(batch.index[columns.pop("split")].tolist()) if "split" in columns else frozenset()
    errors = batch.errors | nonfinite
    clock.batch(n, batch.seconds)
    clock.errors += len(errors)
    clock.nonfinite += len(nonfinite)
    clock.split_rows += len(split)
    return Rows(index=batch.index, label=batch.label, columns=columns, errors=errors, split=split)


def _is_out_of_memory(error: RuntimeError) -> bool:
    # On the CPU torch has no class of its own for it.
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
