"""A rank's time, by stage: in its metrics, and under the same names in a trace."""

import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path

from mgpu_ddp.distributed.world import World
from mgpu_ddp.inference.clock import STAGES, Clock
from mgpu_ddp.inference.trace import STEPS, WARM_UP, Profile


def slow(count: int, seconds: float) -> Iterator[int]:
    for number in range(count):
        time.sleep(seconds)
        yield number


def test_only_the_loaders_time_is_waiting() -> None:
    clock = Clock(warm_up=1, began=0.0)
    passed = []
    for number in clock.waiting_for(slow(3, 0.02)):
        passed.append(number)
        with clock.measuring("predict_s"):
            time.sleep(0.2)
    assert passed == [0, 1, 2]
    assert 0.06 <= clock.wait_s < 0.5
    assert clock.predict_s >= 0.6


def test_a_trace_shows_the_stages_of_the_report(world: World, tmp_path: Path) -> None:
    clock, profile = Clock(warm_up=1, began=0.0), Profile(world, tmp_path, num_batches=STEPS)
    with profile.tracing():
        for _ in range(STEPS + WARM_UP + 1):
            for stage in STAGES:
                with clock.measuring(stage):
                    pass
            profile.step()
    with gzip.open(tmp_path / "profile" / "rank0.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"wait", "input", "predict", "peers"} <= names
    assert all(getattr(clock, stage) > 0 for stage in STAGES)
