"""The decision that all ranks draw from the payloads of a window, case by case."""

from dataclasses import replace
from typing import Any

import pytest

from mgpu_ddp.distributed.sharding import Window
from mgpu_ddp.errors import ProtocolError
from mgpu_ddp.job.agreement import Decision, Limits, Payload, decide
from mgpu_ddp.output.manifest import Part

WINDOW = Window(number=1, start=100, stop=140)
LIMITS = Limits(stop=200, errors_before=0, max_errors=float("inf"))
DONE: dict[str, Any] = {}


def part(first: int, stop: int) -> Part:
    return Part(file=f"part-{first}", first=first, rows=stop - first, errors=0, num_bytes=1, sha256="")


def stop(next_missing: int) -> dict[str, Any]:
    return {"state": "stop", "reason": "SIGTERM", "next_missing": next_missing}


def fail(next_missing: int, reason: str = "OSError: why") -> dict[str, Any]:
    return {"state": "failed", "reason": reason, "next_missing": next_missing}


def decided(*ranks: dict[str, Any], window: Window = WINDOW, **limits: Any) -> Decision:
    done = Payload(
        job="0",
        attempt=0,
        window=window.number,
        state="rows",
        reason="",
        next_missing=window.stop,
        errors=0,
        seconds=1.0,
        part=None,
    )
    return decide([replace(done, **rank) for rank in ranks], window, replace(LIMITS, **limits))


@pytest.mark.parametrize(
    ("ranks", "limits", "frontier", "ending", "failure"),
    [
        # Everything is done, and the task goes on or is at its end.
        ([DONE], {}, 140, None, None),
        ([DONE, DONE, DONE], {}, 140, None, None),
        ([DONE, DONE], {"stop": 140}, 140, None, None),
        # One wish ends it for all; what every rank has done stays.
        ([DONE, stop(121)], {}, 121, "preempted", None),
        ([stop(130), stop(121), DONE], {}, 121, "preempted", None),
        ([DONE, stop(100)], {}, 100, "preempted", None),
        # A rank that has done its share wishes to stop: the window is whole, and the last of this task or not.
        ([DONE, stop(140)], {}, 140, "preempted", None),
        ([DONE, stop(140)], {"stop": 140}, 140, None, None),
        ([stop(139), DONE], {"stop": 140}, 139, "preempted", None),
        # A failure is told before a wish, and the first of several.
        ([DONE, fail(121)], {}, 121, None, "rank 1 of 2 failed: OSError: why"),
        ([stop(130), DONE, fail(121)], {}, 121, None, "rank 2 of 3 failed: OSError: why"),
        ([fail(130, "a"), fail(121, "b")], {}, 121, None, "rank 0 of 2 failed: a"),
        ([DONE, fail(140)], {"stop": 140}, 140, None, "rank 1 of 2 failed: OSError: why"),
        # Errors count over all ranks and what came before; just as many as allowed are not too many.
        ([{"errors": 2}, {"errors": 3}], {"max_errors": 5}, 140, None, None),
        ([{"errors": 2}, {"errors": 3}], {"max_errors": 4}, 140, "too many errors", None),
        ([{"errors": 2}, {"errors": 3}], {"max_errors": 5, "errors_before": 1}, 140, "too many errors", None),
        ([{"errors": 1}], {"max_errors": 0.5, "stop": 140}, 140, "too many errors", None),
        ([{"errors": 9}, stop(121)], {"max_errors": 4}, 121, "preempted", None),
        ([{"errors": 9}, fail(121)], {"max_errors": 4}, 121, None, "rank 1 of 2 failed: OSError: why"),
    ],
)
def test_all_ranks_decide(
    ranks: list[dict[str, Any]], limits: dict[str, Any], frontier: int, ending: str | None, failure: str | None
) -> None:
    decision = decided(*ranks, **limits)
    assert (decision.frontier, decision.ending, decision.failure) == (frontier, ending, failure)
    assert decision.ends == (ending is not None or failure is not None)


def test_the_last_acknowledgement_tells_of_a_failed_write_alone() -> None:
    last = Window(number=9, start=200, stop=200)
    assert decided(DONE, DONE, window=last).failure is None
    assert decided(fail(200, "WriteError: full"), DONE, window=last).failure == "rank 0 of 2 failed: WriteError: full"


def test_parts_below_the_frontier_are_committed_in_dataset_order() -> None:
    first, second, third = part(100, 113), part(113, 126), part(126, 140)
    assert decided({"part": third}, {"part": first}, {"part": second}).parts == (first, second, third)
    # The second rank has done some rows and the third all: a part beyond a gap is dropped.
    some = part(113, 120)
    ended = decided({"part": first}, {"part": some, **stop(120)}, {"part": third})
    assert ended.parts == (first, some)
    assert decided({"part": first}, fail(113), {"part": third}).parts == (first,)
    assert decided(fail(100), {"part": second}, {"part": third}).parts == ()


def test_a_window_takes_as_long_as_on_its_slowest_rank() -> None:
    assert decided({"seconds": 2.0}, {"seconds": 5.0}, {"seconds": 0.1}).slowest_s == 5.0


@pytest.mark.parametrize("elsewhere", [{"job": "1"}, {"attempt": 1}, {"window": 2}])
def test_ranks_in_different_places_find_out(elsewhere: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match=r"rank 2 is in window . of job ., attempt ., but rank 0 in window 1"):
        decided(DONE, DONE, elsewhere)
