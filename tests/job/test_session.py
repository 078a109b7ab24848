"""How a job that raised is told of."""

from pathlib import Path
from typing import Any

import pytest

from mgpu_ddp.config.script import Script
from mgpu_ddp.distributed.command import StartCommand
from mgpu_ddp.distributed.signals import StopWish
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import OutOfMemoryError
from mgpu_ddp.job.cache import Kept
from mgpu_ddp.job.job import Job
from mgpu_ddp.job.session import Session
from tests.support.worlds import tiny

TYPED = ("mgpu-infer", "data=folder", "data.root=a b", "overwrite=true")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError("the network is down"), "mgpu-infer data=folder 'data.root=a b' overwrite=true"),
        (OutOfMemoryError.of("batch_size", 64, RuntimeError("no")), "batch_size=32"),
        (OutOfMemoryError("transform.size must fit into memory, got 9. Lower it."), None),
    ],
)
def test_a_job_that_fails_before_it_has_a_folder_is_started_as_it_was_typed(
    tmp_path: Path, world: World, error: Exception, expected: str | None
) -> None:
    def act(_job: Job) -> dict[str, Any]:
        raise error

    session = Session(world, StopWish(), Kept(), Script(), act)
    start = StartCommand(words=TYPED, cwd=str(tmp_path))
    with pytest.raises(type(error)):
        session.run_job(Job(name="0", config=tiny(), run_dir=tmp_path / "out", start=start))
    command = session.outcomes[-1]["next"]
    assert command is None if expected is None else command.endswith(f" {expected}")
