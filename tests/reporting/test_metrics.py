"""The bottleneck that the report names."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mgpu_ddp.distributed.world import World
from mgpu_ddp.inference.clock import Clock
from mgpu_ddp.output.manifest import Start
from mgpu_ddp.reporting.metrics import (
    FORWARD_ON_CPU,
    REMEDIES,
    RankMetrics,
    all_starts,
    bottleneck,
    measure,
    write_metrics,
)
from tests.support.run_folders import claim, wanted, write_parts

WAITS = ("wait_s", "input_s", "predict_s", "peers_s")


def metrics(world: World) -> RankMetrics:
    return measure(world, Clock(warm_up=1, began=0.0))


@pytest.mark.parametrize(
    ("waits", "named"),
    [
        ({"wait_s": 9.0, "workers_s": {"read": 2.0, "decode": 1.0}}, "read"),
        ({"wait_s": 9.0, "workers_s": {"read": 2.0, "pack": 4.0}}, "pack"),
        ({"wait_s": 9.0, "workers_s": {"read": 2.0, "decode": 3.0}, "decode_s": 8.0}, "decode"),
        ({"wait_s": 9.0}, "read"),
        ({"input_s": 9.0, "decode_s": 8.0, "wait_s": 8.0}, "gpu input"),
        ({"predict_s": 9.0}, "forward"),
        ({"peers_s": 9.0, "write_s": 5.0}, "collect and write"),
        ({"peers_s": 9.0, "write_s": 4.0}, "waiting for peers"),
    ],
)
def test_the_longest_wait_names_the_bottleneck(world: World, waits: dict[str, float], named: str) -> None:
    rank = replace(metrics(world), rows=1, **waits)
    assert bottleneck([rank, metrics(world)]) == (named, 9.0 / sum(waits.get(name, 0.0) for name in WAITS))
    assert named in REMEDIES


def test_a_job_that_had_nothing_to_do_has_no_bottleneck(world: World) -> None:
    assert bottleneck([replace(metrics(world), wait_s=9.0)]) is None


def test_a_forward_pass_on_cpus_is_not_sped_up_by_what_helps_a_gpu(world: World, tmp_path: Path) -> None:
    rank = replace(metrics(world), rows=1, predict_s=9.0, wall_s=9.0)
    others: dict[str, Any] = {"rows": 1, "deterministic": True, "of_job": {}}
    remedies = [
        write_metrics(tmp_path, [replace(rank, device=device)], **others)["remedy"] for device in ("cpu", "NVIDIA H200")
    ]
    assert remedies == [FORWARD_ON_CPU, REMEDIES["forward"]]


def test_starts_are_told_together() -> None:
    starts = [Start(began=0.0, ranks=2, wall_s=6.0, rows=8), Start(began=9.0, ranks=1, wall_s=4.0, rows=12)]
    together = all_starts(wanted(starts=starts))
    assert together == {"starts": 2, "rows": 20, "wall_s": 10.0, "images_per_s": 2.0, "timed": True}


def test_starts_of_before_they_were_timed_are_told_apart(tmp_path: Path) -> None:
    write_parts(claim(tmp_path), 8)
    write_parts(folder := claim(tmp_path, manifest=wanted(starts=[Start(began=time.time(), ranks=1)])), 20, token="u")
    together = all_starts(folder.claimed)
    assert (together["starts"], together["rows"], together["timed"]) == (1, 12, False)
