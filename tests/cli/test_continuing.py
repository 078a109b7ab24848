"""However a job ends, it names the one command that continues it, and that line completes the job in a shell."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import assert_proved, make_images, read_rows
from tests.support.starting import (
    SMALL,
    SMALL_IMAGES,
    Ended,
    Forks,
    committed_rows,
    finish,
    mgpu_infer,
    python_m,
    ranks,
    run,
    started,
    torchrun,
    wait_until,
    worker_pids,
)

SIZE = 1500
LONG = (*SMALL, f"data.size={SIZE}", "output.commit_every=160", "hydra.job.name='it; $(one)'")


def status_of(run_dir: Path) -> dict[str, Any]:
    return dict(json.loads((run_dir / "status.json").read_text()))


def folder_in(tmp_path: Path) -> Path | None:
    """The run folder that was made by the date."""
    return next(iter(tmp_path.glob("outputs/*/*")), None)


def interrupted(command: list[str] | Forks, tmp_path: Path, interrupt: Callable[[int], None]) -> tuple[Ended, Path]:
    """Start a command, interrupt it once it has committed rows, and return how it ended and its run folder."""
    with started(command, tmp_path) as process:
        wait_until(lambda: (folder := folder_in(tmp_path)) is not None and committed_rows(folder) > 0, process)
        interrupt(process.pid)
        ended = finish(process, tmp_path, time.monotonic())
    run_dir = folder_in(tmp_path)
    assert run_dir is not None
    assert 0 < committed_rows(run_dir) < SIZE, "or nothing was interrupted"
    return ended, run_dir


def named_in(ended: Ended, why: str = "to continue") -> str:
    """The command that the terminal shows: one line, once."""
    (line,) = (line for line in ended.err.splitlines() if "mgpu_ddp: to " in line)
    start, _, command = line.partition(f"mgpu_ddp: {why}: ")
    assert start == ""
    return command


def continue_by(command: str, tmp_path: Path) -> Ended:
    """Have a shell run the line somewhere else."""
    (tmp_path / "elsewhere").mkdir()
    ended = run(["bash", "-c", command], tmp_path / "elsewhere")
    assert ended.code == 0, ended.err
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"stderr.txt", "stdout.txt"}
    return ended


def continue_in_forks(command: str, size: int = 1) -> Ended:
    """Have a shell read the line, and forked ranks do what it says."""
    start = shlex.join(python_m() if size == 1 else torchrun(size))
    assert command.count(f"&& {start} ") == 1
    echo = command.replace(f"&& {start} ", "&& printf '%s\\0' \"$PWD\" ")
    folder, *words = subprocess.check_output(["bash", "-c", echo], text=True).split("\0")[:-1]
    ended = run(ranks(size, *words), Path(folder))
    assert ended.code == 0, ended.err
    return ended


def kill(rank: int) -> Callable[[int], None]:
    return lambda launcher: os.kill(worker_pids(launcher)[rank], signal.SIGKILL)


def terminate(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)


ENDS: dict[str, tuple[list[str], Callable[[int], None], str]] = {
    "a lost rank of torchrun": (torchrun(2, *LONG), kill(1), "torchrun --standalone --nproc_per_node=2 -m "),
    "a lost rank 0 of torchrun": (torchrun(3, *LONG), kill(0), "torchrun --standalone --nproc_per_node=3 -m "),
    "a lost rank 0 of mgpu-infer": (mgpu_infer(*LONG), kill(0), "mgpu-infer model.name="),
    "a signal to one process": (python_m(*LONG), terminate, f"{sys.executable} -m mgpu_ddp.infer "),
}


@pytest.mark.parametrize("end", [pytest.param(end, marks=[pytest.mark.slow] * ("lost" in end)) for end in ENDS])
def test_a_job_that_was_cut_short_names_the_command_that_continues_it(
    tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    command, interrupt, start = ENDS[end]
    ended, run_dir = interrupted(command, tmp_path, interrupt)
    assert ended.code != 0
    line = named_in(ended)
    status = status_of(run_dir)
    assert (status["status"], status["next"]) == ("preempted" if interrupt is terminate else "failed", line)
    assert status["counts"]["ok"] == committed_rows(run_dir)
    assert line.startswith(f"cd {shlex.quote(str(tmp_path))} && {start}")
    kept = committed_rows(run_dir)
    assert continue_by(line, tmp_path).summary["rows_this_run"] == SIZE - kept
    assert folder_in(tmp_path) == run_dir
    assert_proved(run_dir, SIZE)


def test_a_job_that_is_killed_with_all_its_ranks_has_said_before_how_to_go_on(tmp_path: Path) -> None:
    _, run_dir = interrupted(ranks(1, *LONG, "overwrite=true"), tmp_path, lambda pid: os.kill(pid, signal.SIGKILL))
    status = status_of(run_dir)
    assert status["status"] == "running", "nobody is left to say otherwise"
    assert "overwrite" not in status["next"]
    continue_in_forks(status["next"])
    assert_proved(run_dir, SIZE)


@pytest.mark.parametrize("number", [1, 2])
def test_errors_name_the_key_that_gets_past_them(tmp_path: Path, number: int) -> None:
    root = tmp_path / "bad ones"
    sorted(make_images(root, 21))[1].write_bytes(b"no image")
    settings = (*SMALL_IMAGES, "data=folder", "data.root=bad ones", "output.dir=it's")
    # The second works beside the result of the first.
    limits = {"max_errors=0": ("max_errors=null", 3, "."), "on_error=raise": ("on_error=record", 1, ".next")}
    for limit, (remedy, code, place) in limits.items():
        ended = run(ranks(number, *settings, limit, f"overwrite={str(code == 1).lower()}"), tmp_path)
        assert ended.code == code, ended.err
        line = named_in(ended)
        words = shlex.split(line)
        assert (words[-1], limit in words, "overwrite=true" in words) == (remedy, False, False)
        assert status_of(tmp_path / "it's" / place)["next"] == ended.summary["next"] == line
    continue_in_forks(line, number)
    assert_proved(tmp_path / "it's", 21, errors=1)
    again = run(ranks(1, *settings), tmp_path)
    assert (again.code, again.summary["rows"], "rows_this_run" in again.summary) == (0, 21, False)
    assert "21 samples: 20 ok, 1 error (in errors.jsonl), 0 missing" in again.out
    assert again.err.count("0 of 21 rows to do") == 1
    assert "complete already: no row was left to predict. overwrite=true starts anew, retry_failed=true" in again.out
    line = named_in(again, "to retry the errors")
    assert shlex.split(line)[-1] == "retry_failed=true"
    paths = sorted(root.rglob("*.*"))
    paths[1].write_bytes(paths[0].read_bytes())
    retried = continue_in_forks(line)
    assert_proved(tmp_path / "it's", 21)
    assert status_of(tmp_path / "it's")["next"] is None
    assert "1 of 1 failed row to do" in retried.err
    assert "0 of 21 rows to do" not in retried.err, "nothing to say of nothing to do"
    assert retried.err.count("preprocessing: ") == 1


def test_a_mistake_names_no_command(tmp_path: Path) -> None:
    ended = run(ranks(2, "batch_size=0"), tmp_path)
    assert (ended.code, ended.err.count("mgpu_ddp: ")) == (2, 1)


@pytest.mark.parametrize("launcher", ["basic", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_a_sweep_that_was_cut_short_names_its_command(tmp_path: Path, launcher: str) -> None:
    settings = (*SMALL, "data.size=600", "output.commit_every=80", "-m", "seed=1,2", f"hydra/launcher={launcher}")

    def first() -> Path | None:
        return next(iter(tmp_path.glob("multirun/*/*/0")), None)

    with started(ranks(1, *settings), tmp_path) as process:
        wait_until(lambda: (folder := first()) is not None and committed_rows(folder) > 0, process)
        process.terminate()
        ended = finish(process, tmp_path, time.monotonic())
    assert ended.code == 75, ended.err
    (sweep,) = tmp_path.glob("multirun/*/*")
    line = named_in(ended)
    assert status_of(sweep / "0")["next"] == ended.summary["next"] == line
    assert shlex.split(line)[-1] == f"hydra.sweep.dir={sweep}"
    continue_in_forks(line)
    assert [len(read_rows(sweep / str(job))) for job in (0, 1)] == [600, 600]
