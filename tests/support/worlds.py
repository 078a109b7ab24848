"""A world of real processes over real gloo, started once and kept for many jobs.

Each rank is a forked process that joins, runs every case as a job of its own (as a sweep does) and leaves.
What a case ended with on each rank lies in OUT/<case>.rank<r>.json.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mgpu_ddp.config.schema import (
    Config,
    DistConfig,
    FakeConfig,
    FolderConfig,
    LoaderConfig,
    ModelConfig,
    OutputConfig,
    RuntimeConfig,
    TransformConfig,
)
from mgpu_ddp.config.script import Script
from tests.support import forks
from tests.support.starting import places_in_world

WORLD_TIMEOUT_S = 200


@dataclass(frozen=True, kw_only=True)
class Case:
    """One job, or one function called on every rank, with what should disturb it."""

    name: str
    config: Config | None = None
    run_dir: str | None = None
    call: Callable[[Any], Any] | None = None
    """Called with the world instead of a job; its result is kept."""
    stop_at: tuple[int, int] | None = None
    """(rank, rows): this rank gets SIGTERM once it has so many rows."""


def tiny(**changes: Any) -> Config:
    """A job of small fake images through a small model; `changes` by top-level key, or by group as a dict."""
    groups: dict[str, Any] = {
        "data": FakeConfig(size=97, image_size=[3, 32, 32]),
        "transform": TransformConfig(size=32),
        "model": ModelConfig(name="squeezenet1_1", weights=None, num_classes=12),
        "loader": LoaderConfig(workers=1),
        "output": OutputConfig(),
        "dist": DistConfig(timeout_s=20),
        "runtime": RuntimeConfig(device="cpu"),
    }
    plain = {"batch_size": 4}
    for key, value in changes.items():
        if isinstance(value, dict):
            for name, item in value.items():
                setattr(groups[key], name, item)
            groups[key].__post_init__()
        elif key in groups:
            groups[key] = value
        else:
            plain[key] = value
    return Config(**groups, **plain)


def folder(root: Path) -> FolderConfig:
    return FolderConfig(root=str(root))


def run_job(config: Config, run_dir: Path, world: Any, script: Script | None = None) -> dict[str, Any]:
    """Run a job in this process; return its summary, or raise what it raises."""
    from mgpu_ddp.distributed.signals import StopWish
    from mgpu_ddp.infer import infer
    from mgpu_ddp.job.cache import Kept
    from mgpu_ddp.job.job import Job

    job = Job(name=run_dir.name, config=config, run_dir=run_dir, script=script or Script())
    return infer(job, world, StopWish(), Kept())


def run_world(size: int, cases: Iterable[Case], out: Path) -> None:
    """Run all cases in one world of `size` ranks, and see every process end well."""
    out.mkdir(parents=True, exist_ok=True)
    ranks = [forks.fork(_rank, list(cases), out, cwd=out, **place) for place in places_in_world(size)]
    deadline = time.monotonic() + WORLD_TIMEOUT_S
    try:
        codes = [rank.wait(max(0.0, deadline - time.monotonic())) for rank in ranks]
        assert codes == [0] * size, (out / "stderr.txt").read_text()
    finally:
        for rank in ranks:
            rank.kill()


def ended(out: Path, case: str, size: int) -> list[Any]:
    """The result or error of each rank in a case."""
    return [json.loads((out / f"{case}.rank{rank}.json").read_text()) for rank in range(size)]


@dataclass
class _AtRows:
    """Send this process a signal as soon as its heartbeat reports so many rows."""

    world: Any
    rows: int
    over: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        while not self.over.wait(0.001):
            if int(self.world.heartbeat.progress.get("rows", 0)) >= self.rows:
                os.kill(os.getpid(), signal.SIGTERM)
                return


def _rank(cases: list[Case], out: Path) -> None:
    from mgpu_ddp.distributed.signals import StopWish
    from mgpu_ddp.distributed.world import join, leave
    from mgpu_ddp.infer import infer
    from mgpu_ddp.job.cache import Kept
    from mgpu_ddp.job.job import Job
    from mgpu_ddp.job.session import Session
    from mgpu_ddp.reporting import console

    world = join()
    console.start_logging(world)
    for case in cases:
        ending: Any
        stop = StopWish()
        stop.install()
        kept = Kept()
        session = Session(world, stop, kept, Script(), lambda job, stop=stop, kept=kept: infer(job, world, stop, kept))
        disturb = _AtRows(world, case.stop_at[1]) if case.stop_at and case.stop_at[0] == world.rank else None
        if disturb is not None:
            world.heartbeat.progress = {"at": "start"}
            threading.Thread(target=disturb.watch, daemon=True).start()
        try:
            if case.call is not None:
                ending = case.call(world)
            else:
                assert case.config is not None
                run_dir = Path(case.run_dir) if case.run_dir else out / case.name
                ending = session.run_job(Job(name=str(cases.index(case)), config=case.config, run_dir=run_dir))
        except Exception as error:
            ending = {"raised": type(error).__name__, "text": str(error)}
        if disturb is not None:
            disturb.over.set()
        (out / f"{case.name}.rank{world.rank}.json").write_text(json.dumps(ending))
    leave(world)
