"""A process reads its surroundings when it joins the others."""

import os
from pathlib import Path

from mgpu_ddp.distributed.world import join, leave
from tests.support import forks
from tests.support.starting import Forks, infer, run

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


def tell_connections() -> None:
    leave(join())
    print(os.environ[CONNECTIONS])


def test_a_process_asks_for_all_connections_to_its_gpu_whatever_the_shell_says(tmp_path: Path) -> None:
    assert forks.fork(tell_connections, cwd=tmp_path, **{CONNECTIONS: "1"}).wait(60) == 0
    assert (tmp_path / "stdout.txt").read_text() == "32\n"


def test_an_environment_that_is_set_by_half_is_a_usage_error_of_one_line(tmp_path: Path) -> None:
    ended = run(Forks(function=infer, arguments=(), environs=[{"RANK": "0"}]), tmp_path)
    assert ended.code == 2
    assert ended.err.startswith(
        "mgpu_ddp: RANK is set in the environment, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT. "
    )
    assert ended.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".txt"] == []
