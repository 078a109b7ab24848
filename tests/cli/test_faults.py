"""A machine that turns against the job: full disks, vanished folders, ranks that hang, signals on signals."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.runs import assert_proved, read_rows
from tests.support.starting import (
    SMALL,
    Process,
    committed_rows,
    finish,
    python_m,
    ranks,
    run,
    started,
    torchrun,
    wait_until,
    worker_pids,
)

LONG = (*SMALL, "data.size=200000", "output.commit_every=400", "output.dir=out")
SLOW_BATCH = (
    "model.name=vgg11",
    "data.size=160",
    "batch_size=40",
    "loader.workers=1",
    "output.commit_every=1",
    "output.dir=out",
)
"""One batch takes about six seconds on one core."""

ON_A_SMALL_DISK = """
set -e
mkdir disk && mount -t tmpfs -o size=$1 tmpfs disk
shift
set +e
"$@" > full.out 2> full.err
echo $? > full.code
set -e
cp -r disk/out full
mount -o remount,size=64m disk
"$@" > again.out 2> again.err
cp -r disk/out again
"""


def own_mounts() -> list[str]:
    """The command that gives a process mounts of its own, without being root."""
    return ["unshare", "--user", "--map-root-user", "--mount"]


@pytest.fixture
def may_mount() -> None:
    if shutil.which("unshare") is None or subprocess.run([*own_mounts(), "true"], capture_output=True).returncode:
        pytest.skip("needs user namespaces, to mount a small disk")


@pytest.mark.usefixtures("may_mount")
@pytest.mark.parametrize("how", ["parquet", "npy"])
def test_a_full_disk_ends_the_job_in_one_line_and_it_resumes_with_more(tmp_path: Path, how: str) -> None:
    size, disk = 10_000, "400k"
    settings = (*SMALL, f"data.size={size}", "output.commit_every=400", "output.topk=12", f"output.format={how}")
    command = python_m(*settings, "output.dir=disk/out")
    ended = run([*own_mounts(), "bash", "-c", ON_A_SMALL_DISK, "bash", disk, *command], tmp_path)
    assert ended.code == 0, ended.err + (tmp_path / "full.err").read_text()
    said = (tmp_path / "full.err").read_text()
    assert "No space left on device" in said
    assert "Traceback" not in said
    if how == "npy":
        # The array is allocated whole, so that the job does not even begin.
        assert (tmp_path / "full.code").read_text() == "2\n"
    else:
        assert (tmp_path / "full.code").read_text() == "1\n"
        kept = committed_rows(tmp_path / "full")
        assert 0 < kept < size
        assert len(read_rows(tmp_path / "full")) >= kept
    assert_proved(tmp_path / "again", size)


def test_a_folder_deleted_in_the_middle_ends_the_job_in_one_line(tmp_path: Path) -> None:
    with started(ranks(2, *LONG), tmp_path) as launcher:
        wait_until(lambda: committed_rows(tmp_path / "out") > 0, launcher)
        (tmp_path / "out").rename(tmp_path / "gone")
        shutil.rmtree(tmp_path / "gone")
        ended = finish(launcher, tmp_path, time.monotonic())
    assert ended.code == 1
    assert ended.seconds < 60
    lines = [line for line in ended.err.splitlines() if " must be writable, got No such file or directory." in line]
    assert lines, ended.err


def test_a_rank_that_hangs_is_named_and_ends_the_job(tmp_path: Path) -> None:
    with started(torchrun(2, *LONG, "dist.timeout_s=5"), tmp_path) as launcher:
        wait_until(lambda: committed_rows(tmp_path / "out") > 0, launcher)
        since = time.monotonic()
        hanging = worker_pids(launcher.pid)[1]
        os.kill(hanging, signal.SIGSTOP)
        wait_until(lambda: "sent no heartbeat" in (tmp_path / "stderr.txt").read_text(), launcher)
        # A beat may be a second old already, and is looked at once a second.
        assert time.monotonic() - since < 5 + 5
        # torchrun itself would wait 30 s for a worker that takes no signal.
        os.kill(hanging, signal.SIGKILL)
        ended = finish(launcher, tmp_path, since)
    assert ended.code == 1
    line = "rank 1 of 2 sent no heartbeat for 5 s (dist.timeout_s), last seen at: "
    assert line in ended.err
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert status["status"] == "failed"
    assert line in status["reason"]


def test_a_slow_rank_is_waited_for(tmp_path: Path) -> None:
    ended = run(ranks(2, *SLOW_BATCH, "limit=41", "dist.timeout_s=2"), tmp_path)
    assert ended.code == 0, ended.err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["ranks"][0]["predict_s"] > 2, "the batch was not slow enough to prove anything"
    assert_proved(tmp_path / "out", 41)


def is_predicting(process: Process, cwd: Path) -> bool:
    """Whether a job of one process has begun its loop: it has said so, and its loader worker is there."""
    has_child = bool(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    return has_child and "rows to do" in (cwd / "stderr.txt").read_text()


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    with started(ranks(1, *SLOW_BATCH), tmp_path) as process:
        wait_until(lambda: is_predicting(process, tmp_path), process)
        since = time.monotonic()
        process.terminate()
        wait_until(lambda: time.monotonic() > since + 2.2, process)
        process.terminate()
        again = time.monotonic()
        ended = finish(process, tmp_path, again)
    assert ended.code == 128 + signal.SIGTERM
    assert ended.seconds < 1
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert status["status"] == "running", "nobody had the time to say anything else"


def test_two_signals_at_once_are_one_wish(tmp_path: Path) -> None:
    with started(ranks(1, *LONG), tmp_path) as process:
        wait_until(lambda: committed_rows(tmp_path / "out") > 0, process)
        process.terminate()
        process.terminate()
        ended = finish(process, tmp_path, time.monotonic())
    assert ended.code == 75, ended.err
    assert ended.seconds < 15
    assert json.loads((tmp_path / "out" / "status.json").read_text())["status"] == "preempted"


def test_a_killed_loader_worker_ends_the_job_with_its_cause(tmp_path: Path) -> None:
    with started(ranks(1, *LONG), tmp_path) as process:
        wait_until(lambda: committed_rows(tmp_path / "out") > 0, process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 1
        os.kill(int(children[0]), signal.SIGKILL)
        ended = finish(process, tmp_path, time.monotonic())
    assert ended.code == 1
    assert f"loader workers must live, got: worker {children[0]} killed by SIGKILL." in ended.err
    assert "Traceback" not in ended.err
    assert json.loads((tmp_path / "out" / "status.json").read_text())["status"] == "failed"


def test_a_killed_rank_leaves_no_loader_worker(tmp_path: Path) -> None:
    with started(ranks(1, *LONG), tmp_path) as process:
        wait_until(lambda: committed_rows(tmp_path / "out") > 0, process)
        (worker,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        process.wait()
        give_up = time.monotonic() + 10
        while Path(f"/proc/{worker}").exists():
            assert time.monotonic() < give_up
            time.sleep(0.05)
