"""What the report names as the bottleneck."""

from dataclasses import replace

import pytest

from mgpu_ddp.metrics import REMEDIES, RankMetrics, bottleneck, measure
from mgpu_ddp.predict import Clock
from mgpu_ddp.world import World

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
