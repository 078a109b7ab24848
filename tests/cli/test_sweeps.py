"""Sweeps: every rank agrees on every job, a failing job harms no other, and the folder says what to use."""

import csv
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.runs import LAUNCH, assert_proved, make_images, read_rows
from tests.support.starting import (
    SMALL,
    SMALL_IMAGES,
    World,
    committed_rows,
    finish,
    launched,
    ranks,
    run,
    started,
    wait_until,
    worker_pids,
)

SWEEP = ("--multirun", "hydra.sweep.dir=sweep")


def job_rows(tmp_path: Path) -> dict[int, dict[str, Any]]:
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"]
    return {row["job"]: row for row in rows}


def statuses(tmp_path: Path) -> list[str]:
    return [row["status"] for _, row in sorted(job_rows(tmp_path).items())]


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A folder of 31 images, of which the second, and so one of rank 1, is broken."""
    root = tmp_path / "broken"
    sorted(make_images(root, 31))[1].write_bytes(b"no image")
    return root


def test_a_job_that_fails_on_one_rank_leaves_the_others_whole(tmp_path: Path, broken: Path) -> None:
    """Ranks that went on alone would mix the rows of different jobs, or deadlock."""
    command = (*SMALL_IMAGES, "data=folder", f"data.root={broken}")
    points = ("batch_size=4,-1,8", "on_error=raise,record")
    ended = run(ranks(3, *command, *SWEEP, *points), tmp_path)
    assert ended.code == 1, ended.err
    assert statuses(tmp_path) == ["failed", "complete", "failed", "failed", "failed", "complete"]
    rows = job_rows(tmp_path)
    for job in (0, 4):
        assert rows[job]["reason"].startswith("rank 1 of 3: class0/image 0003.png (index 1) cannot be predicted: ")
    for job in (2, 3):
        assert rows[job]["reason"] == "batch_size must be at least 1 or auto, got -1. Try batch_size=32."
        assert not (tmp_path / "sweep" / str(job)).exists()
    assert ended.summary["recommended"] in ({"batch_size": n, "on_error": "record"} for n in (4, 8))
    assert (ended.summary["jobs"], ended.summary["failed"]) == (6, 4)
    for job in (1, 5):
        assert_proved(tmp_path / "sweep" / str(job), 31, errors=1)
    alone = ranks(1, *SMALL_IMAGES, "data=folder", f"data.root={broken}", "batch_size=8", "output.dir=alone")
    assert run(alone, tmp_path).code == 0
    assert read_rows(tmp_path / "sweep" / "5") == read_rows(tmp_path / "alone")
    assert rows[5]["reused"] == [], "what a failed job leaves may differ from rank to rank"
    with (tmp_path / "sweep" / "sweep.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["batch_size"], row["on_error"]) for row in table[:2]] == [("4", "raise"), ("4", "record")]


@pytest.mark.parametrize("launcher", ["basic", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_a_sweep_over_paths_takes_each_as_typed(tmp_path: Path, launcher: str) -> None:
    names = ["it's (one)", "Fotos, 日本", "{a}=$#"]
    for count, name in enumerate(names, start=1):
        make_images(tmp_path / name, count)
    sweep = ("--multirun", "hydra.sweep.dir=My {sweep}, it's", f"hydra/launcher={launcher}")
    words = (*SMALL_IMAGES, "data=folder", f"data.root={names[0]},'{names[1]}',{names[2]}", *sweep)
    ended = run(ranks(1, *words), tmp_path)
    assert ended.code == 0, ended.err
    for count in (1, 2, 3):
        assert_proved(tmp_path / "My {sweep}, it's" / str(count - 1), count)


def test_a_sweep_measures_repeats_in_rounds_and_runs_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*SMALL, "data.size=60", "hydra.sweep.dir=sweep", "batch_size=2,4", "sweep.repeats=2")
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("PROCESSES", "2")
    ended = run([str(LAUNCH / "sweep.sh"), *settings], tmp_path)
    assert ended.code == 0, ended.err
    rows = job_rows(tmp_path)
    assert [(row["repeat"], row["values"]["batch_size"]) for row in rows.values()] == [(1, 2), (1, 4), (2, 2), (2, 4)]
    assert [row["reused"] for row in rows.values()] == [[], *[["model", "predictor"]] * 3]
    assert rows[1]["startup_s"] < rows[0]["startup_s"] / 2, "only the first job pays for the process"
    with Image.open(tmp_path / "sweep" / "sweep.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 500
    assert "<- recommended" in ended.out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").glob("*/predictions/*")}
    again = run(ranks(2, "+sweep=batch_size", *settings), tmp_path)
    assert again.code == 0, again.err
    assert job_rows(tmp_path) == rows
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_sweep_that_was_cut_short_starts_again_where_it_was(tmp_path: Path) -> None:
    """First a rank is killed, then a signal comes; each start has another number of ranks."""
    settings = (*SMALL, "data.size=2000", "output.commit_every=100", *SWEEP, "batch_size=4,8,16")
    with started(launched(2, *settings), tmp_path) as process:
        # Amid the start of a job, where the other rank waits for this one and no row flows.
        wait_until((tmp_path / "sweep" / "1").exists, process)
        os.kill(worker_pids(process.pid)[1], signal.SIGKILL)
        ended = finish(process, tmp_path, time.monotonic())
    assert ended.code == 1
    assert ended.seconds < 25, "torchrun kills after 30 s who does not end by itself"
    assert statuses(tmp_path) == ["complete", "failed"]
    assert "rank 1 of 2 died" in job_rows(tmp_path)[1]["reason"]
    assert ended.summary["status"] == "failed"
    kept = committed_rows(tmp_path / "sweep" / "1")
    with started(ranks(1, *settings), tmp_path) as process:
        wait_until(lambda: committed_rows(tmp_path / "sweep" / "2") > 0, process)
        process.terminate()
        ended = finish(process, tmp_path, 0)
    assert ended.code == 75, ended.err
    assert statuses(tmp_path) == ["complete", "complete", "preempted"]
    assert json.loads((tmp_path / "sweep" / "1" / "metrics.json").read_text())["rows_this_run"] == 2000 - kept
    again = run(ranks(1, *settings), tmp_path)
    assert again.code == 0, again.err
    assert statuses(tmp_path) == ["complete"] * 3
    for job in range(3):
        assert_proved(tmp_path / "sweep" / str(job), 2000)


def test_what_does_not_fit_into_memory_is_an_answer(tmp_path: Path) -> None:
    """On rank 1 alone: the kernel refuses it more than half a gigabyte beyond what it has."""
    sizes = ("data.size=150", "data.image_size=[3,8,8]", "transform.size=224", "output.commit_every=20")
    model = ("model.name=squeezenet1_1", "loader.workers=1", "loader.prefetch=1")
    points = ("batch_size=2,128,150,4", "sweep.stop_on_oom=true")
    with started(ranks(2, *sizes, *model, *SWEEP, *points), tmp_path) as process:
        wait_until(lambda: committed_rows(tmp_path / "sweep" / "0") > 0, process)
        assert isinstance(process, World)
        rank = process.ranks[1].pid
        used = int(Path(f"/proc/{rank}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(rank, resource.RLIMIT_AS, (used + (512 << 20), resource.RLIM_INFINITY))
        ended = finish(process, tmp_path, 0)
    assert statuses(tmp_path) == ["complete", "oom", "skipped", "complete"], ended.err
    rows = job_rows(tmp_path)
    assert rows[1]["reason"].startswith("rank 1 of 2: batch_size must fit into memory, got 128 ")
    assert rows[1]["peak_host_bytes"] > 0
    assert rows[2]["reason"] == "batch_size=128 ran out of memory"
    assert "OOM" in ended.out
    assert_proved(tmp_path / "sweep" / "3", 150)
    assert ended.code == 0, "that a batch does not fit is an answer"


def only_child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


@pytest.mark.slow
def test_a_job_that_crashes_under_a_torchrun_of_its_own_does_not_stop_the_rest(tmp_path: Path) -> None:
    apart = ("hydra/launcher=torchrun", "hydra.launcher.nproc_per_node=2")
    command = ranks(1, *SMALL, "data.size=2000", "output.commit_every=100", *SWEEP, *apart, "batch_size=4,-1,16")
    with started(command, tmp_path) as process:
        wait_until(lambda: committed_rows(tmp_path / "sweep" / "0") > 0, process)
        os.kill(worker_pids(only_child(process.pid))[0], signal.SIGSEGV)
        ended = finish(process, tmp_path, 0)
    assert ended.code == 1, ended.err
    assert statuses(tmp_path) == ["failed", "failed", "complete"]
    assert "rank 0 left no outcome" in job_rows(tmp_path)[0]["reason"]
    assert_proved(tmp_path / "sweep" / "2", 2000)
    assert job_rows(tmp_path)[2]["world_size"] == 2
    logs = sorted((tmp_path / "sweep" / "logs" / "2").rglob("stderr.log"))
    assert len(logs) == 2
    assert "rows to do" in logs[0].read_text() + logs[1].read_text()
    assert not (tmp_path / "sweep" / "1").exists()


@pytest.mark.slow
def test_a_sweeper_that_draws_its_points_is_asked_on_rank_0_alone(tmp_path: Path) -> None:
    """Optuna's sampler is random: two ranks that asked it would run different jobs."""
    draw = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "batch_size=range(1,9)")
    ended = run(launched(2, *SMALL, "data.size=20", *SWEEP, *draw), tmp_path)
    assert ended.code == 0, ended.err
    assert statuses(tmp_path) == ["complete"] * 3
    best = (tmp_path / "sweep" / "optimization_results.yaml").read_text()
    fastest = max(job_rows(tmp_path).values(), key=lambda row: float(row["images_per_s"]))
    assert f"batch_size: {fastest['values']['batch_size']}" in best, "images/s is what it maximises"
