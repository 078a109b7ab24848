"""A rank's place read from SLURM's variables, as srun 22.05 sets them for three tasks on two nodes."""

from pathlib import Path
from typing import Any

import pytest

from mgpu_ddp.distributed import slurm
from mgpu_ddp.distributed.place import Place
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import UsageError
from mgpu_ddp.output.manifest import Manifest
from tests.support.worlds import run_job, tiny

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_CPUS_ON_NODE": "16",
    "MASTER_ADDR": "10.0.0.7",
}


def without(*names: str) -> dict[str, str]:
    return {name: value for name, value in STEP.items() if name not in names}


def test_a_task_knows_its_place() -> None:
    place = slurm.read_place(STEP)
    assert place == Place(rank=1, size=3, local_rank=1, local_size=2, cpus=8, master=("10.0.0.7", 32979))
    last = {"SLURM_NODEID": "1", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_CPUS_PER_TASK": "5"}
    place = slurm.read_place({**STEP, **last, "MASTER_PORT": "29500"})
    assert place == Place(rank=2, size=3, local_rank=0, local_size=1, cpus=5, master=("10.0.0.7", 29500))


@pytest.mark.parametrize(
    "environ",
    [STEP | {"RANK": "0"}, STEP | {"SLURM_STEP_NUM_TASKS": "1"}, without("SLURM_STEP_NUM_TASKS")],
    ids=["torchrun", "one task", "a batch script"],
)
def test_who_is_no_task_of_several_is_not_taken_for_one(environ: dict[str, str]) -> None:
    assert slurm.read_place(environ) is None


def test_variables_that_are_missing_are_named() -> None:
    with pytest.raises(
        UsageError, match=r"^SLURM_STEP_NUM_TASKS is set .*, but not SLURM_PROCID, SLURM_NODEID\. Start"
    ):
        slurm.read_place(without("SLURM_PROCID", "SLURM_NODEID"))


def test_numbers_per_node_are_read_as_slurm_writes_them() -> None:
    assert slurm.spread("4") == [4]
    assert slurm.spread("2(x3),1") == [2, 2, 2, 1]
    for text in ("", "x", "2(x)", "2,,1", "$(touch marker)"):
        with pytest.raises(UsageError, match="SLURM_STEP_TASKS_PER_NODE must be numbers such as"):
            slurm.spread(text)


def test_ports_are_no_clients_ports_and_differ_between_steps() -> None:
    ports = {slurm.port_of(job, step) for job in range(4000, 4500) for step in range(3)}
    assert min(ports) >= 20_000
    assert max(ports) < 40_000
    assert len(ports) == 1500


def test_without_an_address_the_user_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        UsageError, match=r"^scontrol show hostnames n\[1-2\] failed .* Set MASTER_ADDR to its address\.$"
    ):
        slurm.read_place(without("MASTER_ADDR"))


@pytest.mark.parametrize(
    ("requeued", "begun_by", "starts_over"),
    [("0", "5", True), ("1", "5", False), ("1", "", True), ("1", "4", True)],
    ids=["another launch", "requeued after its claim", "requeued before its claim", "of an earlier job"],
)
def test_overwrite_counts_once_per_job(
    requeued: str, begun_by: str, starts_over: bool, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(size: int, **changes: Any) -> None:
        run_job(tiny(data={"size": size}, **changes), tmp_path / "run", world)

    run(8)
    manifest = Manifest.read(tmp_path / "run")
    assert manifest is not None
    manifest.slurm_job = begun_by
    manifest.write(tmp_path / "run")
    before = manifest.parts
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_RESTART_COUNT", requeued)
    # Of one launch overwrite counts once; each case here is a launch of its own.
    monkeypatch.setattr(world.link, "launch", type(world.link.launch)(requeued + begun_by, world.link.launch))
    run(8, overwrite=True)
    after = Manifest.read(tmp_path / "run")
    assert after is not None
    assert (after.parts != before) == starts_over
    assert after.complete
