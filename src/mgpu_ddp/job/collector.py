"""Windows of all ranks → durable rows, in a thread behind the predicting one.

Each rank sends one payload per window, an empty one too, and its rows to rank 0 (or writes them itself); `decide` says
what becomes of them. Rank 0's result of writing window k is known to all with window k+1, and one last payload
acknowledges the last window. At most two windows are in flight per rank: one gathered, one predicted.
"""

import logging
import threading
import time
from dataclasses import dataclass, replace
from queue import Queue
from types import TracebackType

from mgpu_ddp.distributed.channel import Channel
from mgpu_ddp.distributed.sharding import Plan, Window
from mgpu_ddp.errors import PeerFailedError, reason_of, words_past
from mgpu_ddp.job.agreement import Decision, Ending, Limits, Payload, State, decide
from mgpu_ddp.job.context import JobContext
from mgpu_ddp.output.parts import PartWriter, Table
from mgpu_ddp.output.rows import Rows, concatenate, in_order

log = logging.getLogger("mgpu_ddp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sink:
    """Where rows go."""

    writer: PartWriter
    table: Table | None
    """On rank 0."""


class Committer:
    """Commits windows with all ranks, one after the other: what the collecting thread does."""

    def __init__(self, context: JobContext, plan: Plan, channel: Channel, sink: Sink, limits: Limits) -> None:
        self._job, self._world, self._clock = context.job.name, context.world, context.clock
        self._plan, self._channel, self._sink, self._limits = plan, channel, sink, limits
        self.error: Exception | None = None
        """Why this rank fails: an error of its own, or another rank's."""

    def commit(self, window: Window, payload: Payload, rows: Rows | None) -> Decision:
        """Commit what all ranks have done of a window. Collective: every rank calls this.

        Raises:
            PeerLostError: a rank died or fell silent.
        """
        # 1) A rank that writes its own rows does so before it tells of them.
        if self._plan.contiguous and rows is not None:
            payload = self._write(payload, rows)
        # 2) Gather the payloads of all ranks, and decide as every rank does.
        payloads = self._gather(payload)
        decision = decide(payloads, window, self._limits)
        # 3) Bring the other rows to rank 0: the other ranks have no use for them, and no room.
        gathered: list[Rows | None] = []
        if not self._plan.contiguous:
            with self._clock.measuring("gather_s"):
                gathered = self._channel.gather_on_first(window.number, rows) or []
        # 4) Rank 0 extends the table. The others learn with the next window whether that worked.
        if self._sink.table is not None and self.error is None:
            self._extend(self._sink.table, decision, [rows for rows in gathered if rows is not None])
        self._plan.gathered(window, decision.slowest_s)
        self._note_failure(decision)
        return decision

    def acknowledge(self, number: int) -> None:
        """Learn whether the last window was committed. Collective: every rank calls this.

        Raises:
            PeerLostError: a rank died or fell silent.
        """
        stop = self._limits.stop
        last = Payload(
            job=self._job,
            attempt=self._world.attempt,
            window=number,
            state="rows",
            reason="",
            next_missing=stop,
            errors=0,
            seconds=0.0,
            part=None,
        )
        self._note_failure(decide(self._gather(last), Window(number=number, start=stop, stop=stop), self._limits))

    def _write(self, payload: Payload, rows: Rows) -> Payload:
        try:
            with self._clock.measuring("write_s"):
                return replace(payload, part=self._sink.writer.write(rows))
        except Exception as error:
            self._fail(error)
            return replace(payload, next_missing=int(rows.index[0]))

    def _gather(self, payload: Payload) -> list[Payload]:
        if self.error is not None:
            payload = replace(payload, state="failed", reason=reason_of(self.error), words=words_past(self.error))
        with self._clock.measuring("gather_s"):
            return self._channel.gather(payload.window, payload)

    def _extend(self, table: Table, decision: Decision, gathered: list[Rows]) -> None:
        try:
            with self._clock.measuring("write_s"):
                if decision.parts:
                    table.list([*decision.parts])
                rows = in_order(gathered, decision.frontier) if gathered else None
                if rows is not None and len(rows):
                    table.add(rows)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.error = error
        self._world.raise_alarm(self._job, reason_of(error))

    def _note_failure(self, decision: Decision) -> None:
        if decision.failure is not None and self.error is None:
            self.error = PeerFailedError(decision.failure, decision.words)


class Collector:
    """Takes a rank's rows in order, and has them committed window by window.

    Use as a context manager around the predicting loop: leaving it ends the task on all ranks alike, also when
    the loop raised. `ending` then says how.

    The threads meet in two queues. The collecting one puts True into `_wants` when it wants a window, and False when
    it has ended, for whatever reason, so that the predicting one cannot deadlock; that one answers each True with one
    window in `_handed`.
    """

    def __init__(self, context: JobContext, plan: Plan, committer: Committer) -> None:
        self._job, self._world, self._clock, self._stop = context.job.name, context.world, context.clock, context.stop
        self._plan, self._committer = plan, committer
        self.ending: Ending = "complete"
        # Of the predicting thread: the window that it is in, and its rows so far.
        self._window: Window | None = None
        self._chunks: list[Rows] = []
        self._window_rows = 0
        self._done_rows = 0
        self._errors = 0
        self._since = time.perf_counter()
        # Between the threads.
        self._wants: Queue[bool] = Queue(1)
        self._handed: Queue[tuple[Payload, Rows | None]] = Queue(1)
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="collector", daemon=True)

    @property
    def over(self) -> bool:
        """True once the loop should end: all agreed to, a rank failed, or this process was asked to stop."""
        heartbeat = self._world.heartbeat
        failed = self._committer.error is not None or heartbeat.alarm is not None or heartbeat.lost is not None
        return self._ended or failed or bool(self._stop)

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
        if self._window is not None and not self._ended:
            reason = reason_of(raised) if raised is not None else self._stop.signal_name or "another rank ended"
            # The others cut their window short as well, rather than finish it first.
            self._world.raise_alarm(self._job, reason)
            self._hand_over(self._window, "stop" if raised is None else "failed", reason, words_past(raised))
        self._thread.join()
        late = raised if self._window is None and isinstance(raised, Exception) else None
        error = self._committer.error
        if error is not None and (raised is None or late is not None):
            raise error
        if late is not None:
            log.warning("after the last window: %s", reason_of(late))
        return late is not None

    def _post_finished_windows(self) -> None:
        while self._window is not None and self._window_rows == len(self._plan.rows(self._window, self._world.rank)):
            if not self._hand_over(self._window, "rows", ""):
                return
            self._chunks, self._window_rows = [], 0
            self._window = self._plan.window(self._window.number + 1)

    def _hand_over(self, window: Window, state: State, reason: str, words: tuple[str, ...] = ()) -> bool:
        """Give a window to the collecting thread, once it is done with the one before. False when it has ended."""
        payload = replace(self._payload(window, state, reason), words=words)
        finished = payload, concatenate(self._chunks) if self._chunks else None
        with self._clock.measuring("peers_s"):
            is_wanted = not self._ended and self._wants.get()
        if is_wanted:
            self._handed.put(finished)
        return is_wanted

    def _payload(self, window: Window, state: State, reason: str) -> Payload:
        owed = self._plan.rows(window, self._world.rank)
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return Payload(
            job=self._job,
            attempt=self._world.attempt,
            window=window.number,
            state=state,
            reason=reason,
            next_missing=owed[self._window_rows] if self._window_rows < len(owed) else window.stop,
            errors=self._errors,
            seconds=seconds,
            part=None,
        )

    def _run(self) -> None:
        """Commit windows until the task ends."""
        number, ends = 0, False
        try:
            while not ends and (window := self._plan.window(number)) is not None:
                self._wants.put(True)
                decision = self._committer.commit(window, *self._handed.get())
                self.ending, ends = decision.ending or "complete", decision.ends
                number += 1
            self._committer.acknowledge(number)
        except Exception as error:
            self._committer.error = self._committer.error or error
        finally:
            self._ended = True
            self._wants.put(False)
