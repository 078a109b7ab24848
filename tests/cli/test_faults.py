"""Faults of the machine: full disks, vanished folders, ranks that hang, workers that are killed, repeated signals."""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.forks import fork
from tests.support.runs import assert_proved, read_rows
from tests.support.starting import (
    SMALL,
    TIMEOUT_S,
    Process,
    committed_rows,
    finish,
    infer,
    launched,
    ranks,
    run,
    script_ranks,
    started,
    wait_until,
    wait_until_gone,
    worker_pids,
)

LONG = (*SMALL, "data.size=200000", "output.commit_every=400", "output.dir=out")
SLOW_BATCH = (
    "model.name=squeezenet1_1",
    "data.image_size=[3,32,32]",
    "loader.workers=1",
    "output.commit_every=1",
    "output.dir=out",
)


def slow_batch(batch_size: int) -> tuple[str, ...]:
    """A job whose batches take about a fifth of a second an image on one core."""
    return (*SLOW_BATCH, "transform.size=1024", f"batch_size={batch_size}", f"data.size={4 * batch_size}")


def on_a_small_disk(size: str, *settings: str) -> None:
    """Run a job on a disk that is too small for it, and again after the disk has grown; keep what each has left."""
    _take_own_mounts()
    Path("disk").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "disk"], check=True)
    for name in ("full", "again"):
        Path(f"{name}.code").write_text(str(_run_alone(Path(f"{name}.err"), *settings)))
        if Path("disk/out").exists():
            shutil.copytree("disk/out", name)
        subprocess.run(["mount", "-o", "remount,size=64m", "disk"], check=True)


def _take_own_mounts() -> None:
    """Give this process mounts of its own, without being root. Source: user_namespaces(7), mount_namespaces(7)."""
    user, group = os.getuid(), os.getgid()
    clone_newuser, clone_newns = 0x10000000, 0x00020000
    if ctypes.CDLL(None, use_errno=True).unshare(clone_newuser | clone_newns):
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def _run_alone(err: Path, *settings: str) -> int:
    """Run a job in a fork of this process, and return its exit code."""
    pid = os.fork()
    if pid == 0:
        with err.open("w") as file:
            os.dup2(file.fileno(), 2)
        code = 99
        try:
            infer(*settings)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def may_mount() -> None:
    own_mounts = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*own_mounts, "true"], capture_output=True).returncode:
        pytest.skip("needs user namespaces, to mount a small disk")


@pytest.mark.usefixtures("may_mount")
@pytest.mark.parametrize("how", ["parquet", "npy"])
def test_a_full_disk_ends_the_job_in_one_line_and_it_resumes_with_more(tmp_path: Path, how: str) -> None:
    size = 4000
    settings = (*SMALL, f"data.size={size}", "output.commit_every=200", "output.topk=12", f"output.format={how}")
    process = fork(on_a_small_disk, "160k", *settings, "output.dir=disk/out", cwd=tmp_path)
    assert process.wait(TIMEOUT_S) == 0, (tmp_path / "stderr.txt").read_text()
    assert (tmp_path / "again.code").read_text() == "0"
    said = (tmp_path / "full.err").read_text()
    assert "No space left on device" in said
    assert "Traceback" not in said
    if how == "npy":
        # The array is allocated whole, so that the job does not even begin.
        assert (tmp_path / "full.code").read_text() == "2"
    else:
        assert (tmp_path / "full.code").read_text() == "1"
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
    lines = [line for line in ended.err.splitlines() if " cannot be written (No such file or directory)." in line]
    assert lines, ended.err


def test_a_rank_that_hangs_is_named_and_ends_the_job(tmp_path: Path) -> None:
    with started(launched(2, *LONG, "dist.timeout_s=5"), tmp_path) as launcher:
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


SLOW = """
import os, time
import mgpu_ddp
from torch import nn

class Slow(nn.Module):
    def forward(self, pixels):
        if os.environ["RANK"] == "0" and os.path.exists("out/manifest.json"):
            time.sleep(4)
        return pixels.mean((2, 3))

mgpu_ddp.main(model=Slow)
"""
"""A model that takes long on one rank, once the job has begun."""


def test_a_slow_rank_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    settings = ("data.size=8", "data.image_size=[3,8,8]", "transform.size=8", "batch_size=4", "loader.workers=1")
    # Tracing would decide once and for all whether it sleeps.
    settings += ("runtime.fold=false", "output.dir=out", "dist.timeout_s=2")
    ended = run(script_ranks(2, tmp_path / "slow.py", *settings), tmp_path)
    assert ended.code == 0, ended.err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["ranks"][0]["predict_s"] > 3, "the batch was not slow enough to prove anything"
    assert_proved(tmp_path / "out", 8)


def is_predicting(process: Process, cwd: Path) -> bool:
    """Check that a job of one process has begun its loop: it has said so, and its loader worker is there."""
    has_child = bool(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    return has_child and "rows to do" in (cwd / "stderr.txt").read_text()


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    with started(ranks(1, *slow_batch(40)), tmp_path) as process:
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
    assert f"loader worker {children[0]} was killed (SIGKILL); out of memory?" in ended.err
    assert "Traceback" not in ended.err
    assert json.loads((tmp_path / "out" / "status.json").read_text())["status"] == "failed"


def test_a_killed_rank_leaves_no_loader_worker(tmp_path: Path) -> None:
    with started(ranks(1, *LONG), tmp_path) as process:
        wait_until(lambda: committed_rows(tmp_path / "out") > 0, process)
        (worker,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        process.wait()
        wait_until_gone([int(worker)])
