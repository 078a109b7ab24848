"""The loop and its clock: batches → model → rows, with nothing collective in it."""

import logging
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

import numpy as np
import torch

from mgpu_ddp.config.resolved import Resolved
from mgpu_ddp.distributed.world import World
from mgpu_ddp.inference.clock import Clock
from mgpu_ddp.inference.cuda_graph import Columns
from mgpu_ddp.inference.gpu_input import GpuInput, Ready, Staging, group_of
from mgpu_ddp.inference.predictor import NONFINITE, Predictor
from mgpu_ddp.loader.batch import Batch
from mgpu_ddp.output.rows import Rows

log = logging.getLogger("mgpu_ddp")


def in_flight(world: World) -> int:
    """Batches handed to the device before the first one's result is awaited, so that it never runs dry."""
    return 2 if world.device.type == "cuda" else world.share_of_cpus + 1


STAGED = 4
"""Groups of batches that are decoded on a GPU while the model runs a batch before."""


def held_batches(resolved: Resolved, world: World) -> int:
    """How many of the loader's batches `predict` may hold at once."""
    if world.device.type != "cuda":
        return in_flight(world) + 1
    group = 1 if resolved.decode == "cpu" else group_of(resolved.batch_size)
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
