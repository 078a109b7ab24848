"""The messages that ranks exchange about a window, and the decision that all of them draw from these.

All ranks read the same payloads, so all decide alike: what of the window is committed, and whether the job ends with
it because everything is done, a rank was asked to stop, a rank failed, or too many samples did.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mgpu_ddp.distributed.sharding import Window
from mgpu_ddp.errors import ProtocolError
from mgpu_ddp.output.manifest import Part

State = Literal["rows", "stop", "failed"]
Ending = Literal["complete", "preempted", "too many errors"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Payload:
    """One rank's message to all others about one window."""

    job: str
    attempt: int
    window: int
    state: State
    reason: str
    next_missing: int
    """The first index of this rank's share that it has not done; the window's end where it owes nothing more."""
    errors: int
    """Error rows of this rank in this task so far."""
    seconds: float
    """Since its window before."""
    part: Part | None
    """Where this rank has written its rows, unless rank 0 writes."""
    words: tuple[str, ...] = ()
    """Overrides with which the job would get past what failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Where a task ends: at its last row, or at too many errors."""

    stop: int
    """The end of its rows."""
    errors_before: int
    """Errors that count besides those of the task."""
    max_errors: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """The outcome of a window, and of the job after it."""

    frontier: int
    """Rows below it are done on every rank and committed; those from it on are dropped."""
    parts: tuple[Part, ...]
    """Parts that ranks have written below the frontier, in dataset order."""
    slowest_s: float
    failure: str | None
    """Names the first rank that failed."""
    words: tuple[str, ...]
    """Overrides with which the job would get past that."""
    ending: Ending | None
    """How the task ends here before its last window, if it does."""

    @property
    def ends(self) -> bool:
        return self.failure is not None or self.ending is not None


def decide(payloads: Sequence[Payload], window: Window, limits: Limits) -> Decision:
    """Conclude from the payloads of all ranks, by rank.

    Raises:
        ProtocolError: the payloads are of several jobs, attempts or windows.
    """
    for rank, payload in enumerate(payloads):
        if _place(payload) != _place(payloads[0]):
            raise ProtocolError(f"rank {rank} is in {_place(payload)}, but rank 0 in {_place(payloads[0])}")
    frontier = min([window.stop, *(payload.next_missing for payload in payloads)])
    parts = [payload.part for payload in payloads if payload.part is not None and payload.part.stop <= frontier]
    failures = [
        f"rank {rank} of {len(payloads)} failed: {payload.reason}"
        for rank, payload in enumerate(payloads)
        if payload.state == "failed"
    ]
    return Decision(
        frontier=frontier,
        parts=tuple(sorted(parts, key=lambda part: part.first)),
        slowest_s=max(payload.seconds for payload in payloads),
        failure=failures[0] if failures else None,
        words=next((payload.words for payload in payloads if payload.state == "failed"), ()),
        ending=None if failures else _ending(payloads, frontier, limits),
    )


def _place(payload: Payload) -> str:
    return f"window {payload.window} of job {payload.job}, attempt {payload.attempt}"


def _ending(payloads: Sequence[Payload], frontier: int, limits: Limits) -> Ending | None:
    # A wish to stop that comes when all is done stops nothing.
    if any(payload.state == "stop" for payload in payloads) and frontier < limits.stop:
        return "preempted"
    errors = limits.errors_before + sum(payload.errors for payload in payloads)
    return "too many errors" if errors > limits.max_errors else None
