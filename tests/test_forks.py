"""A process that is forked for other tests is as good as one that was started."""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from tests.support.forks import fork


def look_around(started: float) -> None:
    """Write down what this process has before it does anything."""
    found = {
        "threads": len(os.listdir("/proc/self/task")),
        "cuda": torch.cuda.is_initialized(),
        "group": torch.distributed.is_initialized(),
        "leads its session": os.getsid(0) == os.getpid(),
        "cwd": os.getcwd(),
        "given": os.environ["GIVEN"],
        "started": started,
    }
    print(json.dumps(found))
    sys.exit(7)


def test_a_forked_process_has_one_thread_no_cuda_and_no_process_group(tmp_path: Path) -> None:
    assert fork(look_around, 1.5, cwd=tmp_path, GIVEN="so").wait(60) == 7
    assert json.loads((tmp_path / "stdout.txt").read_text()) == {
        "threads": 1,
        "cuda": False,
        "group": False,
        "leads its session": True,
        "cwd": str(tmp_path),
        "given": "so",
        "started": 1.5,
    }


def test_a_forked_process_can_be_killed_and_its_errors_are_kept(tmp_path: Path) -> None:
    process = fork(signal.pause, cwd=tmp_path)
    assert process.poll() is None
    process.kill()
    assert process.wait(60) == process.poll() == -signal.SIGKILL
    assert fork(look_around, cwd=tmp_path).wait(60) == 1
    assert "TypeError" in (tmp_path / "stderr.txt").read_text()
