"""Devices on which a job cannot run as it is asked to, by what each rank has found."""

from typing import Any

import pytest

from mgpu_ddp.config.schema import RuntimeConfig
from mgpu_ddp.distributed.devices import Devices, Found, check
from mgpu_ddp.errors import UsageError
from tests.support.worlds import tiny

NONE = Found(node="n0", gpus=0, uuid="", kind="cpu", torch="2.15")


def gpu(uuid: str, node: str = "n0", gpus: int = 2, kind: str = "H200", torch: str = "2.15") -> Found:
    return Found(node=node, gpus=gpus, uuid=uuid, kind=kind, torch=torch)


FOUR = [gpu("a"), gpu("b"), gpu("a", "n1"), gpu("c", "n1")]
"""Two GPUs on each of two nodes, of which two have the same id."""


def mistake(ranks: list[Found], rank: int = 0, strategy: str = "ddp", **runtime: Any) -> str:
    """The message on one rank; empty where the job may run."""
    config = tiny(strategy=strategy, runtime=RuntimeConfig(**{"device": "auto"} | runtime))
    try:
        check(Devices(config=config, rank=rank, ranks=ranks))
    except UsageError as error:
        return str(error)
    return ""


def test_a_job_runs_on_cpus_or_with_a_gpu_for_each_rank() -> None:
    for ranks in ([NONE], [NONE, NONE], [gpu("a")], FOUR):
        assert [mistake(ranks, rank) for rank in range(len(ranks))] == [""] * len(ranks)
    assert mistake([gpu("a")], strategy="data_parallel") == ""
    assert mistake(FOUR, device="cuda") == ""


@pytest.mark.parametrize("others", [{"kind": "H100"}, {"torch": "2.14"}])
def test_unequal_devices_are_a_choice(others: dict[str, str]) -> None:
    ranks = [gpu("a"), gpu("b", "n1", **others)]
    for rank in range(2):
        text = mistake(ranks, rank)
        assert text.startswith("rank 1 has H")
        assert "but rank 0 H200 with torch 2.15" in text
        assert text.endswith("or runtime.deterministic=false.")
    assert mistake(ranks, deterministic=False) == ""


@pytest.mark.parametrize(
    ("ranks", "rank", "words", "asked"),
    [
        ([NONE, NONE], 0, "strategy must be ddp for 2 processes, got 'data_parallel'.", {"strategy": "data_parallel"}),
        ([NONE], 0, "runtime.device must be one this machine has, got 'cuda'.", {"device": "cuda"}),
        ([gpu("a"), NONE], 1, "rank 1 of 2 (n0) has no GPU, but others have.", {}),
        ([gpu("a"), gpu("b"), gpu("a")], 0, "3 processes on n0 need a GPU each, and there are 2. Start at most 2", {}),
        ([*FOUR, gpu("c", "n1")], 4, "3 processes on n1 need a GPU each, and there are 2. Start at most 2", {}),
    ],
)
def test_a_mistake_is_one_line_on_whom_it_concerns(
    ranks: list[Found], rank: int, words: str, asked: dict[str, Any]
) -> None:
    assert mistake(ranks, rank, **asked).startswith(words)
