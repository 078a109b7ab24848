"""The command that started these ranks, as its user would type it again."""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

COMMAND = "MGPU_DDP_COMMAND"
"""The environment variable in which those who start ranks for a user, such as batch scripts, leave their own command;
empty where there is none."""
OPTIONS = {
    "SLURM_STEP_NUM_NODES": "--nodes",
    "SLURM_STEP_NUM_TASKS": "--ntasks",
    "SLURM_CPUS_PER_TASK": "--cpus-per-task",
    "SLURM_GPUS_PER_NODE": "--gpus-per-node",
    "SLURM_GPUS_PER_TASK": "--gpus-per-task",
    "SLURM_JOB_PARTITION": "--partition",
}
"""Options of srun by the variables that tell a task of them. Source: srun(1), output environment variables."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StartCommand:
    """The words of a command, and the folder in which it was typed."""

    words: tuple[str, ...]
    cwd: str


def start_command(environ: Mapping[str, str] = os.environ) -> StartCommand | None:
    """The command that started this process and its peers; None where no command did."""
    if COMMAND in environ:
        words = shlex.split(environ[COMMAND])
    elif "TORCHELASTIC_RUN_ID" in environ:
        # Its workers are children of torchrun, or of mgpu-infer, which runs torchrun's code.
        words = os.fsdecode(Path(f"/proc/{os.getppid()}/cmdline").read_bytes()).split("\0")[:-1]
    else:
        words = list(sys.orig_argv)
        if environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
            options = [f"{option}={environ[name]}" for name, option in OPTIONS.items() if environ.get(name)]
            words = ["srun", *options, *words]
    return StartCommand(words=tuple(_without_interpreter(words)), cwd=os.getcwd()) if words else None


def _without_interpreter(words: list[str]) -> list[str]:
    """Name a console script, such as torchrun, as it was typed: the kernel has put the interpreter before it."""
    if len(words) < 2 or os.path.basename(words[1]) not in ("torchrun", "mgpu-infer"):
        return words
    name = os.path.basename(words[1])
    return [name if shutil.which(name) == words[1] else words[1], *words[2:]]
