"""The loop and its clock: batches → model → rows, with nothing collective in it."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from mgpu_ddp.config import Config
from mgpu_ddp.decoding import GpuInput, Ready, Staging, decode_of, group_of
from mgpu_ddp.errors import OutOfMemoryError
from mgpu_ddp.graphs import Columns, Replayed
from mgpu_ddp.loading import Batch
from mgpu_ddp.models import DTYPES, head_of, precision_of
from mgpu_ddp.preprocess import Transform
from mgpu_ddp.profiling import named_range
from mgpu_ddp.rows import Rows
from mgpu_ddp.world import World

log = logging.getLogger("mgpu_ddp")

PACE_POINTS = 240
NONFINITE = "NonFiniteError: the model's outputs for this image hold NaN or Inf"


class Predictor:
    """Normalise, run the model and keep only what the rows need, all on the model's device."""

    def __init__(self, module: nn.Module, transform: Transform, config: Config, device: torch.device) -> None:
        runtime, output = config.runtime, config.output
        self._module, self._transform, self._device = module, transform, device
        self._dtype, self._channels_last = DTYPES[precision_of(runtime, device)], runtime.channels_last
        decode = decode_of(config, device)
        self.decodes = decode != "cpu"
        """Whether encoded images may come in."""
        self.inputs = (
            GpuInput(transform, device, self._dtype, channels_last=self._channels_last, exact=decode == "exact")
            if device.type == "cuda"
            else None
        )
        self._fields, self._topk = set(output.computed), output.topk
        self._wide_dtype = DTYPES[output.dtype]
        self._splits = runtime.on_oom != "raise"
        # A compiled module has its own ways, and DataParallel's threads cannot be recorded.
        graphs = device.type == "cuda" and runtime.compile != "on" and config.strategy == "ddp"
        self._step: Callable[[torch.Tensor], Columns] = Replayed(self._predict) if graphs else self._predict
        self._kept = threading.local()
        if "embedding" in self._fields:
            head_of(module, config.model.num_classes).register_forward_pre_hook(self._keep_embedding)

    @staticmethod
    def depends_on(config: Config, transform: Transform, device: torch.device) -> Any:
        """What makes one predictor differ from another."""
        output = config.output
        return [
            *(config.model, config.seed, config.runtime, config.strategy, transform, device),
            *(config.data.name, output.format, output.fields, output.topk, output.dtype),
        ]

    def _keep_embedding(self, _head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        features = inputs[0]
        self._kept.embedding = features.mean(dim=(2, 3)) if features.dim() == 4 else features

    def __call__(self, pixels: torch.Tensor) -> Columns:
        """Predict uint8 (batch_size, height, width, 3), or what `GpuInput` made: columns as `Rows` has them.

        Also `finite` bool (batch_size,), and `split` of the same shape where the batch was halved, maybe more
        than once, because the device lacked the memory for it.

        Raises:
            OutOfMemoryError: it did, and batches are not to be split.
        """
        columns = self._attempt(pixels)
        if columns is None:
            log.warning("a batch of %d did not fit in memory and was split: lower batch_size", len(pixels))
            columns = self._in_halves(pixels)
            columns["split"] = torch.ones(len(pixels), dtype=torch.bool)
        return columns

    def _attempt(self, pixels: torch.Tensor) -> Columns | None:
        try:
            with torch.inference_mode():
                return self._step(pixels)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            if len(pixels) == 1 or not self._splits:
                raise OutOfMemoryError.of(len(pixels), error) from None
        return None

    def _in_halves(self, pixels: torch.Tensor) -> Columns:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        halves = pixels.split(-(-len(pixels) // 2))
        parts = [self._attempt(half) or self._in_halves(half) for half in halves]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _predict(self, pixels: torch.Tensor) -> Columns:
        images = pixels
        if pixels.dtype == torch.uint8:
            images = self._transform.normalise(pixels, dtype=self._dtype, channels_last=self._channels_last)
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
        wide = {"logits": logits, "probs": probs}
        if "embedding" in self._fields:
            wide["embedding"] = self._kept.embedding
        for name in self._fields & wide.keys():
            columns[name] = wide[name].to(self._wide_dtype)
            # What is too large for half precision becomes infinite.
            columns["finite"] &= columns[name].isfinite().all(dim=1)
        return columns


@dataclass(slots=True)
class Clock:
    """Where one rank's time went, in seconds of wall time of its main thread unless said otherwise."""

    warm_up: int
    """Batches that the steady rate leaves out: the first of each that run side by side."""
    began: float
    """When the job began, by `time.perf_counter`."""
    reused: tuple[str, ...] = ()
    """What the job before had made."""
    on_batch: Callable[[], None] = lambda: None
    """Called after each batch."""
    started: float = field(default_factory=time.perf_counter)
    wait_s: float = 0.0
    """Waiting for the loader."""
    input_s: float = 0.0
    """Waiting for model input to be made on the GPU."""
    decode_s: float = 0.0
    """Of the threads that make it: inside calls of the GPU's JPEG decoder."""
    predict_s: float = 0.0
    """Forward, on the CPU with normalising; until the result is on the host."""
    gpu_s: float = 0.0
    """Of the GPU: from the begin of each forward pass to the end of the copy of its results."""
    peers_s: float = 0.0
    """Waiting for the windows of all ranks."""
    gather_s: float = 0.0
    """Of the collecting thread: gathering, waiting for slower ranks included."""
    write_s: float = 0.0
    """Of the collecting thread: writing and listing parts."""
    workers_s: dict[str, float] = field(default_factory=dict)
    """Seconds of loader workers, per stage."""
    read_bytes: int = 0
    """Of the loader workers."""
    batch_s: list[float] = field(default_factory=list)
    rows: int = 0
    errors: int = 0
    nonfinite: int = 0
    """Rows whose outputs held NaN or Inf; they count as errors."""
    split_rows: int = 0
    """Rows whose batch was split for lack of memory."""
    first_at: float = 0.0
    ended: float = 0.0
    pace: list[tuple[float, int]] = field(default_factory=list)
    """(seconds since the job began, rows done by then), at most `PACE_POINTS` of them."""
    _pace_s: float = 0.0
    _warm_at: float = 0.0
    _warm_rows: int = 0

    @contextmanager
    def measuring(self, name: str) -> Iterator[None]:
        """Add the time that a block takes."""
        started = time.perf_counter()
        with named_range(name.removesuffix("_s")):
            yield
        setattr(self, name, getattr(self, name) + time.perf_counter() - started)

    def batch(self, rows: int, workers: dict[str, float]) -> None:
        now = time.perf_counter()
        if not self.batch_s:
            self.first_at = now
        if len(self.batch_s) < self.warm_up:
            self._warm_at, self._warm_rows = now, self.rows + rows
        self.batch_s.append(now - (self.ended or self.started))
        self.rows += rows
        self.ended = now
        if not self.pace or now - self.began >= self.pace[-1][0] + self._pace_s:
            self.pace.append((now - self.began, self.rows))
            if len(self.pace) == PACE_POINTS:
                # Every second one goes, and the next come at half the pace.
                self._pace_s = 2 * (self.pace[-1][0] - self.pace[0][0]) / PACE_POINTS
                del self.pace[1:-1:2]
        for stage, seconds in workers.items():
            self.workers_s[stage] = self.workers_s.get(stage, 0.0) + seconds
        self.on_batch()

    @property
    def steady(self) -> tuple[int, float]:
        """Rows after warming up and the seconds they took; all of them where too few came after.

        Batches that run side by side also end side by side: few of them say nothing of a rate.
        """
        if len(self.batch_s) >= 3 * self.warm_up:
            return self.rows - self._warm_rows, self.ended - self._warm_at
        return self.rows, max(self.ended - self.started, 0.0)


def in_flight(world: World) -> int:
    """Batches handed to the device before the first one's result is awaited, so that it never runs dry."""
    return 2 if world.device.type == "cuda" else world.share_of_cpus + 1


STAGED = 4
"""Groups of batches that are decoded on a GPU while the model runs a batch before."""


def held_batches(config: Config, batch_size: int, world: World) -> int:
    """How many of the loader's batches `predict` may hold at once."""
    if world.device.type != "cuda":
        return in_flight(world) + 1
    group = 1 if decode_of(config, world.device) == "cpu" else group_of(batch_size)
    return in_flight(world) + (STAGED + 1) * group + 1


def predict(
    batches: Iterable[tuple[Batch, float]], predictor: Predictor, clock: Clock, world: World
) -> Generator[Rows]:
    """Predict batches in order, a few at a time."""
    if predictor.inputs is None:
        results = _on_cpu(batches, predictor, clock, world)
    else:
        results = _on_gpu(batches, predictor, predictor.inputs, clock, in_flight(world))
    with closing(results):
        for batch, columns in results:
            yield _rows(batch, columns, clock)


def _on_cpu(
    batches: Iterable[tuple[Batch, float]], predictor: Predictor, clock: Clock, world: World
) -> Generator[tuple[Batch, Columns]]:
    """Predict several batches side by side, each in one thread.

    Kernels split over several threads would add up in another order, and the bits of a row would depend on how many
    cores its rank happened to have.
    """
    pending: deque[tuple[Batch, Future[Columns]]] = deque()

    def finished() -> tuple[Batch, Columns]:
        batch, future = pending.popleft()
        with clock.measuring("predict_s"):
            return batch, future.result()

    with ThreadPoolExecutor(world.share_of_cpus, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for batch, waited_s in batches:
            clock.wait_s += waited_s
            pending.append((batch, pool.submit(predictor, batch.pixels)))
            if len(pending) >= in_flight(world):
                yield finished()
        while pending:
            yield finished()


def _on_gpu(
    batches: Iterable[tuple[Batch, float]], predictor: Predictor, inputs: GpuInput, clock: Clock, depth: int
) -> Generator[tuple[Batch, Columns]]:
    """Decode some batches, run the model on the one before them and copy back the ones before that."""
    staged: deque[tuple[Batch, Future[Ready]]] = deque()
    flying: deque[tuple[Batch, Ready, Flight]] = deque()

    def launch() -> None:
        batch, future = staged.popleft()
        with clock.measuring("input_s"):
            ready = staging.wait(future)
        clock.decode_s += ready.decode_s
        with clock.measuring("predict_s"):
            flying.append((batch, ready, Flight(predictor, ready.on_current_stream())))

    def landed() -> tuple[Batch, Columns]:
        batch, _, flight = flying.popleft()
        with clock.measuring("predict_s"):
            columns, busy_s = flight.land()
        clock.gpu_s += busy_s
        return batch, columns

    with closing(Staging(inputs)) as staging:
        for batch, waited_s in batches:
            clock.wait_s += waited_s
            staged.append((batch, staging.submit(batch)))
            if len(staged) > STAGED * (1 if batch.jpegs is None else group_of(len(batch.pixels))):
                launch()
            if len(flying) >= depth:
                yield landed()
        staging.flush()
        while staged or flying:
            if staged:
                launch()
            if not staged or len(flying) >= depth:
                yield landed()


class Flight:
    """A batch on its way through the model and back to the host."""

    def __init__(self, predictor: Predictor, images: torch.Tensor) -> None:
        # Blocking: waiting would otherwise take a core from the loader's workers.
        self._began, self._ended = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
        self._began.record()
        self._columns = {name: c.to("cpu", non_blocking=True) for name, c in predictor(images).items()}
        self._ended.record()

    def land(self) -> tuple[Columns, float]:
        """Wait for the results: on the host, and the seconds that the GPU had spent on them."""
        self._ended.synchronize()
        return self._columns, self._began.elapsed_time(self._ended) / 1e3


def _rows(batch: Batch, found: Columns, clock: Clock) -> Rows:
    n = len(batch.index)
    # Copies, so that rows do not keep the padded buffers alive.
    columns = {name: np.array(column.numpy()[:n]) for name, column in found.items()}
    nonfinite = {i: NONFINITE for i in batch.index[~columns.pop("finite")].tolist() if i not in batch.errors}
    split = frozenset(batch.index[columns.pop("split")].tolist()) if "split" in columns else frozenset()
    errors = batch.errors | nonfinite
    clock.batch(n, batch.seconds)
    clock.read_bytes += batch.read_bytes
    clock.errors += len(errors)
    clock.nonfinite += len(nonfinite)
    clock.split_rows += len(split)
    return Rows(index=batch.index, label=batch.label, columns=columns, errors=errors, split=split)


def _is_out_of_memory(error: RuntimeError) -> bool:
    # On the CPU torch has no class of its own for it.
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
