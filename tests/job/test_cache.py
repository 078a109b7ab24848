"""Objects that jobs take over from each other, and what a failed job leaves of its own."""

import gc
import weakref

import torch

from mgpu_ddp.errors import OutOfMemoryError
from mgpu_ddp.job.cache import Kept
from mgpu_ddp.job.session import forget_frames


def test_a_thing_is_made_once_for_the_same_and_again_for_another() -> None:
    kept, made = Kept(), []

    def get(depends_on: object) -> list[object]:
        return kept.get("model", depends_on, lambda: made.append(depends_on) or [depends_on])

    kept.begin()
    assert get("a") is get("a")
    assert kept.reused == [], "what this job has made itself"
    kept.begin()
    assert get("a") == ["a"]
    assert kept.reused == ["model"]
    kept.begin()
    assert get("b") == ["b"]
    assert (made, kept.reused) == (["a", "b"], [])
    kept.forget()
    assert get("b") == ["b"]
    assert made == ["a", "b", "b"]


def test_only_the_first_job_pays_for_the_start_of_the_process() -> None:
    kept = Kept()
    kept.begin()
    first = kept.began
    kept.begin()
    assert kept.began - first > 0.3, "this process has imported torch"


def test_an_error_holds_nothing_of_its_job_once_it_is_told() -> None:
    """Also what led to it: that is where the tensors were."""
    held: list[weakref.ref[torch.Tensor]] = []

    def hungry() -> None:
        tensor = torch.ones(10)
        held.append(weakref.ref(tensor))
        raise RuntimeError(f"no memory for {tensor.shape}")

    caught: Exception | None = None
    try:
        try:
            hungry()
        except RuntimeError:
            raise OutOfMemoryError("lower it") from None
    except OutOfMemoryError as error:
        caught = error
    assert held[0]() is not None
    forget_frames(caught)
    gc.collect()
    assert held[0]() is None
