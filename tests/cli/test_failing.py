"""A job that goes wrong ends quickly, with its cause named in one line and nothing lost."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from mgpu_ddp.config.help import documented_keys
from tests.support.runs import assert_proved, make_images, read_rows
from tests.support.starting import (
    SMALL,
    SMALL_IMAGES,
    committed_rows,
    finish,
    forked_mgpu_infer,
    launched,
    ranks,
    run,
    run_all,
    started,
    under_nohup,
    wait_until,
    wait_until_gone,
    worker_pids,
)

LONG = (*SMALL, "data.size=200000", "output.commit_every=400", "output.dir=out")
SHORT = 2000


def test_help_or_a_mistake_is_printed_once_and_leaves_no_trace(tmp_path: Path) -> None:
    folders = [tmp_path / "help", tmp_path / "mistake"]
    for folder in folders:
        folder.mkdir()
    helped, mistaken = run_all([ranks(2, "--help"), launched(2, "batch_sizee=3")], folders)
    assert helped.code == 0, helped.err
    for key in documented_keys():
        assert helped.out.count(f"\n{key}  (") == 1, key
    assert mistaken.code == 1, "torchrun knows only 0 and 1"
    line = "mgpu_ddp: batch_sizee must be a known key, got 'batch_sizee=3'. Did you mean batch_size?"
    assert mistaken.err.count(line) == 1
    assert mistaken.out == ""
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["stderr.txt"] * 2 + ["stdout.txt"] * 2


MISTAKES = {
    ("data=folder", "data.root=nowhere", "model.weights=null"): "/nowhere' (No such file or directory). Name another.",
    ("data=folder", "data.root=empty", "model.weights=null"): "holds no image (jpg",
    ("model.name=resnet19",): "model.name must be a torchvision classification model, got 'resnet19'. Did you mean",
    ("runtime.device=cuda",): "runtime.device must be one this machine has, got 'cuda'. Use runtime.device=cpu.",
    ("output.dir=/proc/nowhere",): "output.dir must be a writable folder, got '/proc/nowhere'",
    ("output.dir=foreign",): "output.dir must be empty or hold this job",
    ("output.dir=foreign", "overwrite=true"): "output.dir must be empty or hold this job",
    ("output.dir=.", "model.class_names=classes.json"): "model.class_names must be outside of the files that a job",
    ("model.name=squeezenet1_1", "transform.size=1"): "transform.size must be a size that squeezenet1_1 takes, got 1 (",
    (
        "model.name=squeezenet1_1",
        "transform.size=9",
        "dry_run=true",
    ): "Output size is too small). Try transform.size=224.",
}


def test_each_mistake_has_its_line(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(len(MISTAKES))]
    for folder in folders:
        (folder / "empty").mkdir(parents=True)
        (folder / "foreign" / "predictions").mkdir(parents=True)
        (folder / "foreign" / "predictions" / "mine.txt").write_text("keep me")
    results = run_all([ranks(1, *settings) for settings in MISTAKES], folders)
    for ended, folder, line in zip(results, folders, MISTAKES.values(), strict=True):
        assert ended.code == 2, ended.err
        assert ended.err.count("mgpu_ddp: ") == 1
        assert line in ended.err
        assert "Traceback" not in ended.err
        assert not (folder / "outputs").exists()
        assert (folder / "foreign" / "predictions" / "mine.txt").read_text() == "keep me"


def test_a_working_folder_whose_name_is_not_utf8_needs_an_output_folder_elsewhere(tmp_path: Path) -> None:
    here = tmp_path / os.fsdecode(b"caf\xe9")
    here.mkdir()
    for settings in ((), ("--multirun", "seed=1,2")):
        ended = run(ranks(1, *SMALL, *settings), here)
        assert ended.code == 2, ended.err
        key = "hydra.sweep.dir" if "--multirun" in settings else "output.dir"
        assert re.fullmatch(rf"mgpu_ddp: {key} must be UTF-8 .*\\udce9/.* Choose another, or rename it\.\n", ended.err)
        assert sorted(path.name for path in here.iterdir()) == ["stderr.txt", "stdout.txt"]
    ended = run(ranks(1, *SMALL, "data.size=20", f"output.dir={tmp_path / 'out'}"), here)
    assert ended.code == 0, ended.err
    assert_proved(tmp_path / "out", 20)


def test_a_list_that_shrank_is_another_job(tmp_path: Path) -> None:
    paths = make_images(tmp_path / "images", 5)
    listed = tmp_path / "list.txt"
    settings = (*SMALL_IMAGES, "data=list", f"data.path={listed}", "data.root=/", "output.dir=out")
    listed.write_text("".join(f"{path}\n" for path in paths))
    assert run(ranks(1, *settings), tmp_path).code == 0
    listed.write_text("".join(f"{path}\n" for path in paths[:3]))
    ended = run(ranks(1, *settings), tmp_path)
    assert ended.code == 2, ended.err
    assert "samples=[0, 5] there, [0, 3] here" in ended.err
    assert_proved(tmp_path / "out", 5)


@pytest.mark.parametrize("transform", ["auto", "imagenet"])
def test_a_plan_of_missing_data_is_refused_by_every_rank_in_one_line(tmp_path: Path, transform: str) -> None:
    data = ("data=array", "data.path=/missing.npy", f"transform={transform}")
    ended = run(ranks(2, *SMALL_IMAGES, *data, "dry_run=true"), tmp_path)
    assert ended.code == 2, ended.err
    (line,) = ended.err.splitlines()
    assert "/missing.npy" in line


@pytest.mark.parametrize("key", ["output.dir", "hydra.run.dir"])
def test_a_plan_needs_no_writable_folder(tmp_path: Path, key: str) -> None:
    ended = run(ranks(1, *SMALL, "data.size=20", "dry_run=true", f"{key}=/proc/nowhere/at/all"), tmp_path)
    assert ended.code == 0, ended.err
    assert "\npreprocessing  resize 32x32, bilinear\n" in ended.out
    assert ended.summary["run_dir"] == "/proc/nowhere/at/all"
    assert "\ndevice         CPU, 1 process, precision fp32\n" in ended.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stderr.txt", "stdout.txt"]


TOO_LARGE = {
    ("batch_size=100000000", "data.size=1000000000"): "batch_size must fit into memory, got 100000000",
    ("model.num_classes=1000000000000",): "model.num_classes must fit into memory, got 1000000000000",
    ("data.image_size=[3,1000000,1000000]",): "data.image_size must fit into memory, got [3, 1000000, 1000000]",
    ("transform.size=1000000",): "transform.size must fit into memory, got 1000000",
    ("transform.size=1000000", "dry_run=true"): "transform.size must fit into memory, got 1000000",
}


def test_what_cannot_fit_into_memory_is_refused_before_it_is_tried(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(len(TOO_LARGE))]
    for folder in folders:
        folder.mkdir()
    results = run_all([ranks(1, "model.name=squeezenet1_1", *settings) for settings in TOO_LARGE], folders)
    for ended, folder, line in zip(results, folders, TOO_LARGE.values(), strict=True):
        assert ended.code == 1, ended.err
        assert ended.err.count(f" {line}: it takes ") == 1
        assert "Traceback" not in ended.err
        assert not (folder / "outputs").exists()


def test_a_rank_that_raises_is_the_root_cause(tmp_path: Path) -> None:
    paths = make_images(tmp_path / "bad", 40)
    sorted(paths)[21].write_bytes(b"broken")
    settings = (*SMALL_IMAGES, "data=folder", "data.root=bad", "on_error=raise", "output.dir=out")
    ended = run(launched(2, *settings), tmp_path)
    assert ended.code == 1
    assert ended.seconds < 60
    report = ended.err.partition("Root Cause")[2]
    assert "rank      : 1" in report
    assert "SampleError" in report
    assert sorted(paths)[21].name in report
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert status["status"] == "failed"
    assert sorted(paths)[21].name in status["reason"]


def test_a_killed_rank_ends_the_others_and_another_world_continues(tmp_path: Path) -> None:
    settings = (*SMALL, f"data.size={SHORT}", "output.commit_every=160", "output.dir=out")
    with started(launched(3, *settings), tmp_path) as launcher:
        wait_until(lambda: committed_rows(tmp_path / "out") > 0, launcher)
        since = time.monotonic()
        os.kill(worker_pids(launcher.pid)[1], signal.SIGKILL)
        ended = finish(launcher, tmp_path, since)
        assert ended.code == 1
        assert ended.seconds < 20
        assert "PeerLostError: rank 1 of 3 died, last seen at: " in ended.err
        report = ended.err.partition("Root Cause")[2]
        assert "rank      : 1" in report
        assert "SIGKILL" in report
        assert json.loads((tmp_path / "out" / "status.json").read_text())["status"] == "failed"
        kept = committed_rows(tmp_path / "out")
        assert 0 < kept < SHORT
        again = run(ranks(2, *settings), tmp_path)
        assert again.code == 0, again.err
        assert again.summary["rows_this_run"] == SHORT - kept
        assert_proved(tmp_path / "out", SHORT)
        assert run(ranks(1, *settings[:-1], "output.dir=whole"), tmp_path).code == 0
        assert read_rows(tmp_path / "out") == read_rows(tmp_path / "whole")


def test_a_signal_preempts_and_the_exit_code_says_so(tmp_path: Path) -> None:
    with started(forked_mgpu_infer(*LONG), tmp_path) as launcher:
        wait_until(lambda: committed_rows(tmp_path / "out") > 0, launcher)
        since = time.monotonic()
        launcher.terminate()
        ended = finish(launcher, tmp_path, since)
        assert ended.code == 75, ended.err
        assert ended.seconds < 15
        status = json.loads((tmp_path / "out" / "status.json").read_text())
        assert status["status"] == "preempted"
        assert status["counts"]["ok"] == committed_rows(tmp_path / "out") > 0
        assert "Traceback" not in ended.err


def test_a_hangup_preempts_as_a_signal_to_terminate_does(tmp_path: Path) -> None:
    with started(ranks(1, *LONG), tmp_path) as job:
        wait_until(lambda: committed_rows(tmp_path / "out") > 0, job)
        os.kill(job.pid, signal.SIGHUP)
        ended = finish(job, tmp_path, time.monotonic())
        assert ended.code == 75, ended.err
        assert json.loads((tmp_path / "out" / "status.json").read_text())["status"] == "preempted"


def test_under_nohup_a_hangup_ends_nothing_and_a_quit_preempts(tmp_path: Path) -> None:
    with started(under_nohup(forked_mgpu_infer(*LONG)), tmp_path) as launcher:
        wait_until(lambda: committed_rows(tmp_path / "out") > 0, launcher)
        # A terminal that closes tells every process.
        for pid in (launcher.pid, *worker_pids(launcher.pid)):
            os.kill(pid, signal.SIGHUP)
        before = committed_rows(tmp_path / "out")
        wait_until(lambda: committed_rows(tmp_path / "out") > before, launcher)
        os.kill(launcher.pid, signal.SIGQUIT)
        ended = finish(launcher, tmp_path, time.monotonic())
        assert ended.code == 75, ended.err
        assert json.loads((tmp_path / "out" / "status.json").read_text())["status"] == "preempted"


def test_a_folder_in_use_is_refused_until_its_job_is_dead(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    settings = (*LONG[:-1], f"output.dir={tmp_path / 'out'}")
    with started(ranks(1, *settings), tmp_path) as first:
        wait_until(lambda: committed_rows(tmp_path / "out") > 0, first)
        second = run(ranks(1, *settings), other)
        assert second.code == 2, second.err
        assert f"(held by process {first.pid} on " in second.err
        assert json.loads((tmp_path / "out" / "status.json").read_text())["status"] == "running"
        first.kill()
        first.wait()
    with started(ranks(1, *settings), other) as third:
        before = committed_rows(tmp_path / "out")
        wait_until(lambda: committed_rows(tmp_path / "out") > before, third)


@pytest.mark.parametrize("when", ["importing", pytest.param("committing", marks=pytest.mark.slow)])
def test_killing_the_launcher_leaves_no_worker(tmp_path: Path, when: str) -> None:
    with started(launched(2, *LONG), tmp_path) as launcher:
        if when == "importing":
            wait_until(lambda: sum(map(has_torch, worker_pids(launcher.pid))) == 2, launcher)
        else:
            wait_until(lambda: committed_rows(tmp_path / "out") > 0, launcher)
        workers = worker_pids(launcher.pid)
        assert len(workers) == 2
        launcher.kill()
        launcher.wait()
        wait_until_gone(workers)


def has_torch(pid: int) -> bool:
    """Check that a process has begun to import torch, which takes it a second."""
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.timeout(300)
def test_a_restarted_worker_continues_in_the_same_folder(tmp_path: Path) -> None:
    settings = (*SMALL, f"data.size={SHORT}", "output.commit_every=200")
    with started(launched(2, *settings, options=("--standalone", "--max-restarts=2")), tmp_path) as launcher:

        def folders() -> list[Path]:
            return list(tmp_path.glob("outputs/*/*"))

        wait_until(lambda: bool(folders()) and committed_rows(folders()[0]) > 0, launcher)
        os.kill(worker_pids(launcher.pid)[0], signal.SIGKILL)
        ended = finish(launcher, tmp_path, time.monotonic())
        assert ended.code == 0, ended.err
        assert len(folders()) == 1
        assert_proved(folders()[0], SHORT)
