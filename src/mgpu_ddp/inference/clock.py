"""Measures where one rank's time goes."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from mgpu_ddp.inference.trace import named_range

T = TypeVar("T")
STAGES = {
    "wait_s": "waiting for the loader",
    "input_s": "GPU input",
    "predict_s": "predicting",
    "peers_s": "waiting for peers",
}
"""Where a rank's main thread spends its time, by the field of `Clock` that measures it. The report lists these stages,
and a profile shows them as ranges of these names without their _s."""
PACE_POINTS = 240


@dataclass(slots=True)
class Clock:
    """One rank's times, in seconds of wall time of its main thread unless said otherwise."""

    warm_up: int
    """Batches that the steady rate leaves out: as many as run side by side."""
    began: float
    """When the job began, by `time.perf_counter`."""
    reused: tuple[str, ...] = ()
    """Names of what an earlier job of this process had made."""
    on_batch: Callable[[], None] = lambda: None
    """Called after each batch."""
    started: float = field(default_factory=time.perf_counter)
    wait_s: float = 0.0
    """Waiting for the loader."""
    input_s: float = 0.0
    """Waiting for model input to be made on the GPU."""
    decode_s: float = 0.0
    """Inside calls to the GPU's JPEG decoder, in the threads that make model input."""
    predict_s: float = 0.0
    """Waiting for the model, until its results are on the host. On the CPU it normalises as well."""
    gpu_s: float = 0.0
    """On the GPU, from the start of each forward pass to the end of copying its results."""
    peers_s: float = 0.0
    """Waiting for the windows of all ranks."""
    gather_s: float = 0.0
    """Gathering, in the collecting thread; waiting for slower ranks included."""
    write_s: float = 0.0
    """Writing and listing parts, in the collecting thread."""
    workers_s: dict[str, float] = field(default_factory=dict)
    """Seconds of loader workers, per stage."""
    read_bytes: int = 0
    """Read by the loader workers."""
    clipped: int = 0
    """Boxes that reached beyond their image."""
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
        """Add the time that a block takes to this field."""
        started = time.perf_counter()
        with named_range(name.removesuffix("_s")):
            yield
        setattr(self, name, getattr(self, name) + time.perf_counter() - started)

    def waiting_for(self, batches: Iterable[T]) -> Iterator[T]:
        """Pass batches on, and add the time until each has come to `wait_s`."""
        coming = iter(batches)
        while True:
            with self.measuring("wait_s"):
                batch = next(coming, None)
            if batch is None:
                return
            yield batch

    def batch(self, rows: int, workers: dict[str, float], number: int = 1) -> None:
        """Count batches whose rows are done, with the seconds that loader workers spent on them per stage."""
        now = time.perf_counter()
        if not self.batch_s:
            self.first_at = now
        if len(self.batch_s) < self.warm_up:
            self._warm_at, self._warm_rows = now, self.rows + rows
        self.batch_s.append((now - (self.ended or self.started)) / number)
        self.rows += rows
        self.ended = now
        if not self.pace or now - self.began >= self.pace[-1][0] + self._pace_s:
            self.pace.append((now - self.began, self.rows))
            if len(self.pace) == PACE_POINTS:
                # Every second point goes, and the next ones come at half the pace.
                self._pace_s = 2 * (self.pace[-1][0] - self.pace[0][0]) / PACE_POINTS
                del self.pace[1:-1:2]
        for stage, seconds in workers.items():
            self.workers_s[stage] = self.workers_s.get(stage, 0.0) + seconds
        for _ in range(number):
            self.on_batch()

    @property
    def steady(self) -> tuple[int, float]:
        """Rows after warming up and the seconds they took; all of them where too few came after.

        Batches that run side by side also end side by side: few of them say nothing of a rate.
        """
        if len(self.batch_s) >= 3 * self.warm_up:
            return self.rows - self._warm_rows, self.ended - self._warm_at
        return self.rows, max(self.ended - self.started, 0.0)
