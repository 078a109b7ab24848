"""Windows of all ranks → durable rows, in a thread behind the predicting one.

Each rank sends one payload per window, an empty one too, and its rows to rank 0. All ranks read the same list of
payloads, so all judge alike and end after the same window: when everything is done, when some rank wished to stop,
or when some rank failed. Rank 0's result of writing window k is known to all with window k+1, and one last payload
acknowledges the last window. At most two windows are in flight per rank: one gathered, one predicted.
"""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Literal

from mgpu_ddp.distributed.channel import Channel
from mgpu_ddp.distributed.sharding import Plan, Window
from mgpu_ddp.distributed.signals import StopWish
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import PeerFailedError, ProtocolError, reason_of
from mgpu_ddp.inference.clock import Clock
from mgpu_ddp.output.manifest import Part
from mgpu_ddp.output.parts import PartWriter, Table
from mgpu_ddp.output.rows import Rows, concatenate, in_order

log = logging.getLogger("mgpu_ddp")

State = Literal["rows", "stop", "failed"]
Ending = Literal["complete", "preempted", "too many errors"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Payload:
    """What one rank tells all others about one window."""

    job: str
    attempt: int
    window: int
    state: State
    reason: str
    next_missing: int
    """The first index of this rank's share that it has not done; the window's end where it owes nothing more."""
    errors: int
    """Error rows of this rank in this job so far."""
    seconds: float
    part: Part | None
    """Where this rank has written its rows, unless rank 0 writes."""


class Collector:
    """Takes a rank's rows in order, and has them committed window by window.

    Use as a context manager around the predicting loop: leaving it ends the job on all ranks alike, also when
    the loop raised. `ending` then says how.
    """

    def __init__(
        self,
        *,
        job: str,
        world: World,
        plan: Plan,
        channel: Channel,
        writer: PartWriter,
        table: Table | None,
        clock: Clock,
        stop: StopWish,
        errors_before: int,
        max_errors: float,
    ) -> None:
        self._job, self._world, self._plan, self._channel = job, world, plan, channel
        self._writer, self._table, self._clock = writer, table, clock
        self._stop, self._errors_before, self._max_errors = stop, errors_before, max_errors
        self.ending: Ending = "complete"
        self._done_rows = 0
        self._errors = 0
        self._error: Exception | None = None
        self._chunks: list[Rows] = []
        self._window: Window | None = None
        self._window_rows = 0
        self._since = time.perf_counter()
        self._over = False
        self._handed: tuple[Payload, Rows | None] | None = None
        self._turn = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="collector", daemon=True)

    @property
    def over(self) -> bool:
        """Whether the loop should end: all agreed to, a rank failed, or this process was asked to stop."""
        heartbeat = self._world.heartbeat
        return (
            self._over
            or self._error is not None
            or bool(self._stop)
            or heartbeat.alarm is not None
            or heartbeat.lost is not None
        )

    def __enter__(self) -> "Collector":
        self._window = self._plan.window(0)
        self._thread.start()
        self._post_finished_windows()
        return self

    def add(self, rows: Rows) -> None:
        """Take one batch of this rank's rows; they follow the ones before."""
        self._chunks.append(rows)
        self._window_rows += len(rows)
        self._done_rows += len(rows)
        self._errors += len(rows.errors)
        self._world.heartbeat.progress = {
            "at": f"row {int(rows.index[-1])}",
            "rows": self._done_rows,
            "errors": self._errors,
        }
        self._post_finished_windows()

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """End with all ranks: post what is done of the current window, then wait for the last acknowledgement.

        What a rank raises after its last window (a dead loader worker, say) ends nothing: the others have gone on to
        prove the table, and nobody needs more from it.
        """
        if self._window is not None and not self._over:
            reason = reason_of(raised) if raised is not None else self._stop.signal_name or "another rank ended"
            # The others cut their window short as well, rather than finish it first.
            self._world.raise_alarm(self._job, reason)
            self._hand_over(self._payload(self._window, "stop" if raised is None else "failed", reason))
        self._thread.join()
        late = raised if self._window is None and isinstance(raised, Exception) else None
        if self._error is not None and (raised is None or late is not None):
            raise self._error
        if late is not None:
            log.warning("after the last window: %s", reason_of(late))
        return late is not None

    def _post_finished_windows(self) -> None:
        while self._window is not None and self._window_rows == len(self._plan.rows(self._window, self._world.rank)):
            window = self._window
            if not self._hand_over(self._payload(window, "rows", "")):
                return
            self._chunks, self._window_rows = [], 0
            self._window = self._plan.window(window.number + 1)

    def _payload(self, window: Window, state: State, reason: str) -> tuple[Payload, Rows | None]:
        owed = self._plan.rows(window, self._world.rank)
        now = time.perf_counter()
        payload = Payload(
            job=self._job,
            attempt=self._world.attempt,
            window=window.number,
            state=state,
            reason=reason,
            next_missing=owed[self._window_rows] if self._window_rows < len(owed) else window.stop,
            errors=self._errors,
            seconds=now - self._since,
            part=None,
        )
        self._since = now
        return payload, concatenate(self._chunks) if self._chunks else None

    def _hand_over(self, finished: tuple[Payload, Rows | None]) -> bool:
        """Give a window to the collecting thread, once it is done with the one before. False when it has ended."""
        with self._clock.measuring("peers_s"), self._turn:
            while self._handed is not None and not self._over:
                self._turn.wait()
            self._handed = None if self._over else finished
            self._turn.notify_all()
        return not self._over

    def _run(self) -> None:
        try:
            number = 0
            while (window := self._plan.window(number)) is not None:
                with self._turn:
                    while self._handed is None:
                        self._turn.wait()
                if self._collect(window, *self._handed):
                    break
                with self._turn:
                    self._handed = None
                    self._turn.notify_all()
                number += 1
            self._acknowledge(number + 1)
        except Exception as error:
            self._error = self._error or error
        finally:
            with self._turn:
                self._over = True
                self._turn.notify_all()

    def _collect(self, window: Window, payload: Payload, rows: Rows | None) -> bool:
        """Gather one window of all ranks and commit what they have done of it. True when the job ends with it."""
        if self._plan.contiguous and rows is not None:
            try:
                with self._timing_writes():
                    payload = replace(payload, part=self._writer.write(rows))
            except Exception as error:
                self._fail(error)
                owed = self._plan.rows(window, self._world.rank)
                payload = replace(payload, state="failed", reason=reason_of(error), next_missing=owed[0])
        if self._error is not None:
            payload = replace(payload, state="failed", reason=reason_of(self._error))
        payloads = self._gather(window.number, payload)
        everybodys = None if self._plan.contiguous else self._gather_rows(window.number, rows)
        ended = [p for p in payloads if p.state != "rows"]
        frontier = min([window.stop, *(p.next_missing for p in payloads)])
        if self._table is not None and self._error is None:
            try:
                with self._timing_writes():
                    self._commit(self._table, payloads, everybodys or [], frontier)
            except Exception as error:
                self._fail(error)
        self._plan.gathered(window, max(p.seconds for p in payloads))
        failed = next(
            (
                f"rank {r} of {self._world.size} failed: {p.reason}"
                for r, p in enumerate(payloads)
                if p.state == "failed"
            ),
            None,
        )
        if failed is not None:
            self._error = self._error or PeerFailedError(failed)
        elif ended and frontier < self._plan.stop:
            self.ending = "preempted"
        elif self._errors_before + sum(p.errors for p in payloads) > self._max_errors:
            self.ending = "too many errors"
        return failed is not None or self.ending != "complete"

    def _gather(self, window: int, payload: Payload) -> list[Payload]:
        started = time.perf_counter()
        payloads: list[Payload] = self._channel.gather(window, payload)
        self._clock.gather_s += time.perf_counter() - started
        for rank, other in enumerate(payloads):
            if (other.job, other.attempt, other.window) != (payload.job, payload.attempt, payload.window):
                raise ProtocolError(
                    f"all ranks must be in job {payload.job}, attempt {payload.attempt}, window {payload.window}, got"
                    f" job {other.job}, attempt {other.attempt}, window {other.window} from rank {rank}."
                )
        return payloads

    def _gather_rows(self, window: int, rows: Rows | None) -> list[Rows | None] | None:
        """Bring the rows of all ranks to rank 0: the others have no use for them, and no room."""
        started = time.perf_counter()
        everybodys = self._channel.gather_on_first(window, rows)
        self._clock.gather_s += time.perf_counter() - started
        return everybodys

    def _commit(self, table: Table, payloads: list[Payload], everybodys: Sequence[Rows | None], frontier: int) -> None:
        if self._plan.contiguous:
            parts = [p.part for p in payloads if p.part is not None and p.part.stop <= frontier]
            if parts:
                table.list(sorted(parts, key=lambda part: part.first))
            return
        chunks = [rows for rows in everybodys if rows is not None]
        rows = in_order(chunks, frontier) if chunks else None
        if rows is not None and len(rows):
            table.add(rows)

    @contextmanager
    def _timing_writes(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._clock.write_s += time.perf_counter() - started

    def _fail(self, error: Exception) -> None:
        self._error = error
        self._world.raise_alarm(self._job, reason_of(error))

    def _acknowledge(self, number: int) -> None:
        """Tell all ranks whether the last window was committed."""
        state: State = "failed" if self._error is not None else "rows"
        last = Payload(
            job=self._job,
            attempt=self._world.attempt,
            window=number,
            state=state,
            reason=reason_of(self._error) if self._error else "",
            next_missing=self._plan.stop,
            errors=self._errors,
            seconds=0.0,
            part=None,
        )
        for rank, payload in enumerate(self._gather(number, last)):
            if payload.state == "failed" and self._error is None:
                self._error = PeerFailedError(f"rank {rank} of {self._world.size} failed: {payload.reason}")
