"""Batches → rows of this rank, with several batches at work at once. Knows nothing of other ranks."""

import math
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from mgpu_ddp.config.resolved import Resolved
from mgpu_ddp.distributed.world import World
from mgpu_ddp.inference.clock import Clock
from mgpu_ddp.inference.gpu_input import STAGED, GpuInput, Ready, Staged, Staging, held_pieces
from mgpu_ddp.inference.outputs import FINITE, SPLIT, Columns, OutputsError, on_host
from mgpu_ddp.inference.predictor import NONFINITE, Predictor
from mgpu_ddp.loader.batch import Batch
from mgpu_ddp.output.columns import ColumnType
from mgpu_ddp.output.rows import Rows

LAUNCH_S = 0.1
"""A launch of several batches takes at most so long: a job that is stopped waits for those in flight."""


def in_flight(world: World, streams: int = 1) -> int:
    """How many batches the device has before the first one's result is awaited, so that it never runs dry."""
    return streams + 1 if world.device.type == "cuda" else world.share_of_cpus + 1


def held_batches(resolved: Resolved, world: World) -> int:
    """How many batches `predict` may hold at once."""
    if world.device.type != "cuda":
        return in_flight(world) + 1
    return (in_flight(world, resolved.speedups.streams) + STAGED + 2) * resolved.batches_together


def held_slots(resolved: Resolved, world: World) -> int:
    """How many of the loader's batches or pieces `predict` may hold at once."""
    return held_pieces(resolved) if resolved.on_gpu else held_batches(resolved, world)


def predict(
    batches: Iterable[Batch],
    predictor: Predictor,
    clock: Clock,
    world: World,
    types: Sequence[ColumnType] | None = None,
) -> Generator[Rows]:
    """Predict batches in order, a few at a time.

    Raises:
        OutputsError: the model's outputs for a batch are not of these types.
    """
    if predictor.inputs is None:
        results = _on_cpu(batches, predictor, clock, world)
    else:
        results = GpuPipeline(predictor, predictor.inputs, clock, world).run(batches)
    with closing(results):
        for batch, columns in results:
            rows = _rows(batch, columns, clock)
            if types is not None:
                with _told_with(batch, world):
                    _check_types(rows, types)
            yield rows


class GpuPipeline:
    """Makes input of some batches, runs the model on the one before them and copies back the results before that.

                    stage            launch             land
        loader ──────────► staged ──────────► in flight ──────► rows
                   wait_s           input_s            predict_s    the clock that runs
                           `most_staged`      `depth`               the most batches between two stages

    A batch that is decoded moves on at once, as long as nothing has to be waited for: the first one need not wait for
    those read ahead, and they need not wait for the model. Waiting for a decoder that has enough to do counts as
    input_s.

    Small batches are staged several as one. They are launched so as well where the model is fast: what Python does for
    a launch would otherwise take longer than the model.

    All three stages run in the rank's main thread. Input is made in threads and on streams of `Staging`. The model
    runs on the current stream, or, where its forward waits for the GPU, in threads with a stream each.
    """

    def __init__(self, predictor: Predictor, inputs: GpuInput, clock: Clock, world: World) -> None:
        self._predictor, self._clock, self._world = predictor, clock, world
        self._depth = in_flight(world, predictor.streams)
        self._staging = Staging(inputs)
        self._staged: deque[Staged] = deque()
        self._ready: deque[tuple[Batch, Ready]] = deque()
        """Batches of the oldest staged one, to be launched one by one."""
        self._batch_s = math.inf
        """Seconds that the GPU has spent on a batch, at least."""
        self._flying: deque[tuple[Batch, Ready, Flight | Future[Flight]]] = deque()
        self._threads = ThreadPoolExecutor(predictor.streams) if predictor.streams > 1 else None

    def run(self, batches: Iterable[Batch]) -> Generator[tuple[Batch, Columns]]:
        with self._threads or nullcontext(), closing(self._staging):
            for piece in self._clock.waiting_for(batches):
                self.stage(piece)
                yield from self._advance(self._staging.most_staged)
            yield from self._advance(most_staged=-1)
            while self._flying:
                yield self.land()

    def _advance(self, most_staged: int) -> Generator[tuple[Batch, Columns]]:
        """Launch and land what is ready; wait only while more than so many batches are staged."""
        while self._ready or self._staged:
            is_due = len(self._staged) > most_staged
            if not is_due and not self._may_launch():
                break
            if len(self._flying) < self._depth:
                self.launch()
            elif is_due or self._flying[0][2].done():
                yield self.land()
            else:
                break
        # Each question to the driver keeps the decoder's threads from it: only where the model has nothing else to do.
        if not self._may_launch():
            while self._flying and self._flying[0][2].done():
                yield self.land()

    def _may_launch(self) -> bool:
        return bool(self._ready or (self._staged and self._staged[0].is_done()))

    def stage(self, piece: Batch) -> None:
        """Let the input of a piece be made."""
        with self._clock.measuring("input_s"):
            staged = self._staging.submit(piece)
        if staged is not None:
            self._staged.append(staged)

    def launch(self) -> None:
        """Wait for the oldest staged input, and queue the model and the copy of its results behind it."""
        if not self._ready:
            self._unstage()
        batch, ready = self._ready.popleft()
        with self._clock.measuring("predict_s"), _told_with(batch, self._world):
            if self._threads is None:
                self._flying.append((batch, ready, Flight(self._predictor, batch, ready)))
            else:
                self._flying.append((batch, ready, self._threads.submit(self._fly, batch, ready)))

    def _unstage(self) -> None:
        """Wait for the oldest staged input, and take it apart where its batches are launched one by one."""
        staged = self._staged.popleft()
        with self._clock.measuring("input_s"):
            ready = self._staging.wait(staged)
        batch = staged.batch
        self._clock.decode_s += self._staging.take_decode_s()
        launch_s = self._batch_s * batch.rows / batch.batch_size
        if batch.rows == batch.batch_size or (self._threads is None and launch_s <= LAUNCH_S):
            self._ready.append((batch, ready))
        else:
            self._ready.extend((each, replace(ready, images=ready.images[rows])) for rows, each in batch.split())

    def _fly(self, batch: Batch, ready: Ready) -> "Flight":
        with torch.cuda.device(self._world.device), torch.cuda.stream(stream_of_thread()):
            flight = Flight(self._predictor, batch, ready)
            flight.wait()
        return flight

    def land(self) -> tuple[Batch, Columns]:
        """Wait for the results of the oldest batch in flight."""
        # Its input is kept until now: memory given back earlier could not be used again before the model is done.
        batch, _, flight = self._flying.popleft()
        with self._clock.measuring("predict_s"), _told_with(batch, self._world):
            columns, busy_s = (flight if isinstance(flight, Flight) else flight.result()).land()
        self._clock.gpu_s += busy_s
        self._batch_s = min(self._batch_s, busy_s * batch.batch_size / batch.rows)
        return batch, columns


_of_thread = threading.local()


def stream_of_thread() -> torch.cuda.Stream:
    """A stream of the current device that this thread has for itself."""
    if not hasattr(_of_thread, "stream"):
        _of_thread.stream = torch.cuda.Stream()
    stream: torch.cuda.Stream = _of_thread.stream
    return stream


class Flight:
    """A batch on its way through the model and back to the host."""

    def __init__(self, predictor: Predictor, batch: Batch, ready: Ready) -> None:
        images = ready.on_current_stream()
        # Blocking: waiting would otherwise take a core from the loader's workers.
        self._began, self._ended = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
        self._began.record()
        self._columns = {
            name: c.to("cpu", non_blocking=True) for name, c in predictor(images, batch.batch_size).items()
        }
        self._ended.record()

    def done(self) -> bool:
        return bool(self._ended.query())

    def wait(self) -> None:
        self._ended.synchronize()

    def land(self) -> tuple[Columns, float]:
        """Wait for the results: on the host, with the seconds that the GPU spent on them."""
        self.wait()
        return self._columns, self._began.elapsed_time(self._ended) / 1e3


def _on_cpu(
    batches: Iterable[Batch], predictor: Predictor, clock: Clock, world: World
) -> Generator[tuple[Batch, Columns]]:
    """Predict several batches side by side, each in one thread.

    Kernels split over several threads would add up in another order, and the bits of a row would depend on how many
    cores its rank happened to have.
    """
    flying: deque[tuple[Batch, Future[Columns]]] = deque()
    side_by_side = 1 if predictor.serial else world.share_of_cpus
    with ThreadPoolExecutor(side_by_side, initializer=torch.set_num_threads, initargs=(1,)) as threads:
        for batch in clock.waiting_for(batches):
            flying.append((batch, threads.submit(predictor, batch.pixels, batch.batch_size)))
            if len(flying) >= in_flight(world):
                yield _landed(flying, clock, world)
        while flying:
            yield _landed(flying, clock, world)


def _landed(flying: deque[tuple[Batch, Future[Columns]]], clock: Clock, world: World) -> tuple[Batch, Columns]:
    """Wait for the results of the oldest batch."""
    batch, future = flying.popleft()
    with clock.measuring("predict_s"), _told_with(batch, world):
        return batch, future.result()


@contextmanager
def _told_with(batch: Batch, world: World) -> Iterator[None]:
    """Name the batch and the rank in what is said of a model's outputs, and below the traceback of its forward."""
    where = f"batch of rows {batch.index[0]} to {batch.index[-1]}, rank {world.rank} of {world.size}"
    try:
        yield
    except OutputsError as error:
        raise OutputsError(f"{error} ({where})") from error
    except Exception as error:
        error.add_note(where)
        raise


def _rows(batch: Batch, found: Columns, clock: Clock) -> Rows:
    n = len(batch.index)
    columns: dict[str, Any] = {name: on_host(column, n) for name, column in found.items()}
    nonfinite = {i: NONFINITE for i in batch.index[~columns.pop(FINITE)].tolist() if i not in batch.errors}
    split = frozenset(batch.index[columns.pop(SPLIT)].tolist()) if SPLIT in columns else frozenset()
    errors = batch.errors | nonfinite
    clock.batch(n, batch.seconds, -(-n // batch.batch_size))
    clock.read_bytes += batch.read_bytes
    clock.clipped += batch.clipped
    clock.errors += len(errors)
    clock.nonfinite += len(nonfinite)
    clock.split_rows += len(split)
    return Rows(
        index=batch.index, label=batch.label, columns=columns, errors=errors, split=split, carried=batch.carried
    )


def _check_types(rows: Rows, types: Sequence[ColumnType]) -> None:
    found = [ColumnType.of(name, column) for name, column in rows.columns.items()]
    if found != [*types]:
        differing = [each for each in found if each not in types] or [each for each in types if each not in found]
        before = [each for each in types if each.name in {other.name for other in differing}] or types
        raise OutputsError(
            f"the model returned {', '.join(map(str, differing))}, but at the start {', '.join(map(str, before))}:"
            " every batch must have the same columns, dtypes and shapes"
        )
