"""The command that started a process, read from where each way of starting leaves it."""

import shlex
import sys

import pytest

from mgpu_ddp.distributed.command import COMMAND, StartCommand, start_command
from tests.support.starting import BIN

OWN = ("python3", "-X", "utf8", "-m", "mgpu_ddp.infer", "data.root=it's")


def words_of(environ: dict[str, str]) -> list[str]:
    command = start_command(environ)
    assert isinstance(command, StartCommand)
    return [*command.words]


@pytest.fixture(autouse=True)
def typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", [*OWN])


def test_a_process_alone_was_typed_itself() -> None:
    assert words_of({}) == [*OWN]


def test_a_task_of_srun_is_asked_for_again_with_its_options() -> None:
    environ = {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NUM_NODES": "3", "SLURM_CPUS_PER_TASK": "4"}
    assert words_of(environ) == ["srun", "--nodes=3", "--ntasks=6", "--cpus-per-task=4", *OWN]
    assert words_of({"SLURM_STEP_NUM_TASKS": "1"}) == [*OWN]


def test_who_starts_ranks_for_a_user_leaves_the_users_command() -> None:
    assert words_of({COMMAND: shlex.join(["sbatch", "it's"]), "TORCHELASTIC_RUN_ID": "x"}) == ["sbatch", "it's"]
    assert start_command({COMMAND: ""}) is None


@pytest.mark.parametrize("on_path", [True, False])
def test_a_console_script_is_named_as_it_was_typed(on_path: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(BIN) if on_path else "/usr/bin")
    script = str(BIN / "torchrun")
    environ = {COMMAND: shlex.join([sys.executable, script, "--standalone", "mine.py"])}
    assert words_of(environ) == ["torchrun" if on_path else script, "--standalone", "mine.py"]
