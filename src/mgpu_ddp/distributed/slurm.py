"""What SLURM says of this process, where srun started it and no torchrun stands between.

Source: srun(1) and sbatch(1), the variables that they set.
"""

import os
import re
import subprocess
from dataclasses import dataclass

from mgpu_ddp.errors import UsageError

FIRST_PORT, PORTS = 20_000, 20_000
"""Below those that the kernel gives to clients, from 32768 or 49152 on, as a rule."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One task of a job step."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    cpus: int
    """CPUs of this task."""
    master: tuple[str, int]
    """Address and port at which rank 0 can be reached."""


def read_task() -> Task | None:
    """This process as a task of a job step of several tasks; None where it is alone, or a worker of torchrun.

    Raises:
        UsageError: SLURM does not say where the first task runs.
    """
    environ = os.environ
    if "RANK" in environ or int(environ.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return None
    per_node = spread(environ["SLURM_STEP_TASKS_PER_NODE"])
    local_size = per_node[int(environ["SLURM_NODEID"])]
    # Without --cpus-per-task there is one core for each task, which may have several threads.
    cpus = environ.get("SLURM_CPUS_PER_TASK") or int(environ.get("SLURM_CPUS_ON_NODE", local_size)) // local_size
    port = environ.get("MASTER_PORT") or port_of(environ["SLURM_JOB_ID"], environ["SLURM_STEP_ID"])
    return Task(
        rank=int(environ["SLURM_PROCID"]),
        size=int(environ["SLURM_STEP_NUM_TASKS"]),
        local_rank=int(environ["SLURM_LOCALID"]),
        local_size=local_size,
        cpus=max(1, int(cpus)),
        master=(environ.get("MASTER_ADDR") or _address_of_first(environ["SLURM_STEP_NODELIST"]), int(port)),
    )


def is_requeued() -> bool:
    """Whether SLURM has started this job before."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def job_id() -> str:
    """The number of the job, with that of its task in an array; empty outside of SLURM."""
    environ = os.environ
    if "SLURM_ARRAY_JOB_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID", "")


def spread(text: str) -> list[int]:
    """Read SLURM's way of writing a number for each node, such as `2(x3),1`."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UsageError(f"SLURM must write one number for each node, got {text!r}. Start by torchrun.")
        numbers += [int(match[1])] * int(match[2] or 1)
    return numbers


def port_of(job: str, step: str) -> int:
    """A port that every task of a step finds alone, and other steps hardly have."""
    return FIRST_PORT + (int(job) * 7 + int(step)) % PORTS


def _address_of_first(nodes: str) -> str:
    """Where SLURM itself reaches the first node: its name need not resolve."""
    names = _ask("hostnames", nodes).split()
    if not names:
        raise UsageError(f"scontrol must name the nodes of the step, got none for {nodes!r}. Set MASTER_ADDR.")
    found = re.search(r"\bNodeAddr=(\S+)", _ask("node", names[0]))
    return found[1] if found else names[0]


def _ask(what: str, of: str) -> str:
    command = ["scontrol", "show", what, of]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise UsageError(f"{' '.join(command)} must answer, got {type(error).__name__}. Set MASTER_ADDR.") from None
