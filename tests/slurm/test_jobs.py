"""Jobs on a real cluster of three nodes: they come back after a preemption, and fail fast with their cause."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, status_of
from tests.support.runs import LAUNCH, assert_proved, make_images, read_rows
from tests.support.starting import SMALL, SMALL_IMAGES, committed_rows, python_m, ranks, run

SIZE = 6001
LONG = (*SMALL, f"data.size={SIZE}", "output.commit_every=120")
MERGE = [sys.executable, "-m", "mgpu_ddp.merge"]

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of the same job in one process."""
    root = tmp_path_factory.mktemp("undisturbed")
    ended = run(ranks(1, *LONG, "output.dir=out"), root)
    assert ended.code == 0, ended.err
    return root / "out"


def ranks_of(run_dir: Path) -> dict[int, int]:
    """Ranks that work in a folder, by number: their process."""
    pids = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            environ = dict(word.partition(b"=")[::2] for word in (path / "environ").read_bytes().split(b"\0"))
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            siblings = (path.parent / str(parent) / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        works_there = b"mgpu_ddp.infer" in words and any(run_dir.name.encode() in word for word in words)
        # A loader worker has the same command line as the rank it belongs to.
        if works_there and words != siblings and b"SLURM_PROCID" in environ:
            pids[int(environ.get(b"RANK", environ[b"SLURM_PROCID"]))] = int(path.name)
    return pids


@pytest.mark.slow
def test_a_preempted_job_on_two_nodes_comes_back_and_loses_nothing(
    cluster: Cluster, tmp_path: Path, undisturbed: Path
) -> None:
    """Once a signal comes, as before a time limit, and the job queues again by itself; once SLURM requeues it."""
    job = cluster.submit("--nodes=2", "--ntasks-per-node=1", str(LAUNCH / "slurm.sbatch"), *LONG, cwd=tmp_path)
    run_dir = tmp_path / "outputs" / f"slurm-{job}"
    cluster.wait_for(lambda: committed_rows(run_dir) > 0)
    cluster.run("scancel", "--batch", "--signal=TERM", str(job))
    cluster.wait_for(lambda: cluster.job(job)["Restarts"] == "1")
    assert status_of(run_dir)["status"] == "preempted"
    before = committed_rows(run_dir)
    assert 0 < before < SIZE
    cluster.wait_for(lambda: committed_rows(run_dir) > before)
    cluster.run("scontrol", "requeue", str(job))
    cluster.wait_for(lambda: cluster.job(job)["Restarts"] == "2")
    assert committed_rows(run_dir) < SIZE
    ended = cluster.wait(job)
    assert ended["JobState"] == "COMPLETED", (tmp_path / f"mgpu_ddp-{job}.out").read_text()
    assert_proved(run_dir, SIZE)
    assert read_rows(run_dir) == read_rows(undisturbed)
    logs = sorted((tmp_path / "slurm-logs" / str(job)).rglob("stderr.log"))
    assert len(logs) >= 6, "one of each rank and start"


@pytest.mark.slow
def test_srun_needs_no_torchrun_and_a_killed_task_ends_the_step(cluster: Cluster, tmp_path: Path) -> None:
    """Three nodes, with as many rows as they cannot share evenly."""
    command = ["srun", "-N3", "-n3", "--kill-on-bad-exit=1", *python_m(*LONG, "output.dir=killed")]
    with (tmp_path / "stderr.txt").open("w") as err, (tmp_path / "stdout.txt").open("w") as out:
        step = subprocess.Popen(command, env=cluster.environ, cwd=tmp_path, stdout=out, stderr=err)
        cluster.wait_for(lambda: committed_rows(tmp_path / "killed") > 0)
        os.kill(ranks_of(tmp_path / "killed")[1], signal.SIGKILL)
        assert step.wait(60) != 0
    assert status_of(tmp_path / "killed")["status"] in ("failed", "running")
    assert "rank 1 of 3 died" in (tmp_path / "stderr.txt").read_text()
    kept = committed_rows(tmp_path / "killed")
    text = cluster.run(*command, cwd=tmp_path)
    summary = json.loads(text.splitlines()[-1])
    assert (summary["world_size"], summary["rows_this_run"]) == (3, SIZE - kept)
    assert_proved(tmp_path / "killed", SIZE)


@pytest.mark.slow
def test_an_array_of_shards_is_restartable_alone_and_merges(
    cluster: Cluster, tmp_path: Path, undisturbed: Path
) -> None:
    script = str(LAUNCH / "slurm_array.sbatch")
    array = cluster.submit("--array=0-2", script, *LONG, cwd=tmp_path)
    run_dir = tmp_path / "outputs" / f"slurm-{array}"
    shard = run_dir / "shard-1-of-3"
    cluster.wait_for(lambda: committed_rows(shard) > 0)
    cluster.run("scancel", f"{array}_1")
    for task in range(3):
        assert cluster.wait(f"{array}_{task}")["JobState"] == ("CANCELLED" if task == 1 else "COMPLETED")
    left = SIZE // 3 - committed_rows(shard)
    early = subprocess.run([*MERGE, f"run={run_dir}"], capture_output=True, text=True, timeout=60)
    assert early.returncode == 2
    assert f"shard-1-of-3 is not complete: {left} of its" in early.stderr
    again = cluster.environ | {"RUN_DIR": f"outputs/slurm-{array}", "SHARDS": "3"}
    submitted = subprocess.run(
        ["sbatch", "--wait", "--array=1", script, *LONG], env=again, cwd=tmp_path, capture_output=True, timeout=120
    )
    assert submitted.returncode == 0, submitted.stderr
    merged = subprocess.run([*MERGE, f"run={run_dir}"], capture_output=True, text=True, timeout=60)
    assert merged.returncode == 0, merged.stderr
    assert json.loads(merged.stdout)["rows"] == SIZE
    assert_proved(run_dir, SIZE)
    assert read_rows(run_dir) == read_rows(undisturbed)


@pytest.mark.slow
def test_a_job_that_fails_is_continued_by_the_command_in_its_status(cluster: Cluster, tmp_path: Path) -> None:
    root = tmp_path / "it's bad"
    sorted(make_images(root, 9))[1].write_bytes(b"no image")
    settings = (*SMALL_IMAGES, "data=folder", "data.root=it's bad", "on_error=raise")
    job = cluster.submit("--nodes=1", "--ntasks-per-node=2", str(LAUNCH / "slurm.sbatch"), *settings, cwd=tmp_path)
    assert cluster.wait(job)["JobState"] == "FAILED"
    run_dir = tmp_path / "outputs" / f"slurm-{job}"
    line = status_of(run_dir)["next"]
    assert f"mgpu_ddp: to continue: {line}\n" in (tmp_path / f"mgpu_ddp-{job}.out").read_text()
    said = subprocess.run(
        ["bash", "-c", line], cwd="/", env=cluster.environ, capture_output=True, text=True, timeout=60
    )
    assert said.returncode == 0, said.stderr
    again = int(said.stdout.split()[-1])
    assert cluster.wait(again)["JobState"] == "COMPLETED", (tmp_path / f"mgpu_ddp-{again}.out").read_text()
    assert_proved(run_dir, 9, errors=1)


@pytest.mark.slow
def test_a_sweep_in_one_allocation(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(
        str(LAUNCH / "slurm_sweep.sbatch"), "--multirun", *SMALL, "data.size=30", "batch_size=3,6", cwd=tmp_path
    )
    assert cluster.wait(job)["JobState"] == "COMPLETED", (tmp_path / f"mgpu_ddp_sweep-{job}.out").read_text()
    sweep = tmp_path / "multirun" / f"slurm-{job}"
    assert {"sweep.csv", "sweep.json", "sweep.png"} <= {path.name for path in sweep.iterdir()}
    assert json.loads((sweep / "sweep.json").read_text())["status"] == "complete"
    assert_proved(sweep / "1", 30)


@pytest.mark.slow
def test_a_sweep_with_an_allocation_for_each_job(cluster: Cluster, tmp_path: Path) -> None:
    command = python_m(*SMALL, "data.size=30", "--multirun", "batch_size=3,-1,6", "hydra.sweep.dir=sweep")
    settings = ("hydra/launcher=slurm", "hydra.launcher.nodes=2", "hydra.launcher.partition=all")
    done = subprocess.run([*command, *settings], env=cluster.environ, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"]
    assert [(row["status"], row.get("world_size")) for row in rows] == [
        ("complete", 2),
        ("failed", None),
        ("complete", 2),
    ]
    assert_proved(tmp_path / "sweep" / "2", 30)


@pytest.mark.slow
def test_a_script_of_the_users_runs_in_a_job_and_in_an_allocation_for_each_job(
    cluster: Cluster, tmp_path: Path
) -> None:
    script = tmp_path / "mine.py"
    script.write_text("""
import torch, mgpu_ddp

class Means(torch.nn.Module):
    def forward(self, images):
        return {"mean": images.mean(dim=(1, 2, 3))}

if __name__ == "__main__":
    mgpu_ddp.main(model=Means)
""")
    settings = ("data.size=30", "data.image_size=[3,32,32]", "transform.size=32", "batch_size=4", "loader.workers=1")
    job = cluster.submit(
        f"--export=ALL,SCRIPT={script}",
        *("--nodes=2", "--ntasks-per-node=1", str(LAUNCH / "slurm.sbatch"), *settings),
        cwd=tmp_path,
    )
    ended = cluster.wait(job)
    assert ended["JobState"] == "COMPLETED", (tmp_path / f"mgpu_ddp-{job}.out").read_text()
    by_sbatch = tmp_path / "outputs" / f"slurm-{job}"
    assert_proved(by_sbatch, 30)
    words = ("--multirun", "seed=1,2", "hydra.sweep.dir=sweep", "hydra/launcher=slurm", "hydra.launcher.partition=all")
    command = [sys.executable, str(script), *settings, *words]
    done = subprocess.run(command, env=cluster.environ, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [
        [row["mean"] for row in read_rows(folder)] for folder in (by_sbatch, *(tmp_path / "sweep" / i for i in "01"))
    ]
    assert rows[0] == rows[1] == rows[2]


def test_a_mistake_in_a_job_is_said_once_and_is_not_tried_again(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(str(LAUNCH / "slurm.sbatch"), "batch_size=-1", cwd=tmp_path)
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")
    said = (tmp_path / f"mgpu_ddp-{job}.out").read_text()
    assert said.count("batch_size must be at least 1 or auto, got -1") == 1
    assert not (tmp_path / "outputs").exists()
