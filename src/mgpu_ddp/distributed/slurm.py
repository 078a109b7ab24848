"""SLURM's variables: this process as a task that srun started without torchrun, and the job it belongs to.

Source: srun(1) and sbatch(1), output environment variables.
"""

import os
import re
import subprocess

from mgpu_ddp.distributed.place import Environ, Place, numbers, refuse_missing
from mgpu_ddp.errors import UsageError

FIRST_PORT, PORTS = 20_000, 20_000
"""Below those that the kernel gives to clients, from 32768 or 49152 on, as a rule."""
NUMBERS = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID", "SLURM_STEP_ID")
OTHERS = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST")
REMEDY = "Start by srun, which sets all of them, or by torchrun."


def read_place(environ: Environ) -> Place | None:
    """This process as a task of a job step of several tasks; None where it is alone, or a worker of torchrun.

    Raises:
        UsageError: SLURM's variables are incomplete, or do not say where the first task runs.
    """
    if "RANK" in environ or environ.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return None
    refuse_missing(environ, (*NUMBERS, *OTHERS), "SLURM_STEP_NUM_TASKS", REMEDY)
    size, rank, local_rank, node, job, step = numbers(environ, NUMBERS, REMEDY)
    local_size = spread(environ["SLURM_STEP_TASKS_PER_NODE"])[node]
    # Without --cpus-per-task there is one core for each task, which may have several threads.
    cpus = environ.get("SLURM_CPUS_PER_TASK") or (cpus_of_node(environ) or local_size) // local_size
    address = environ.get("MASTER_ADDR") or _address_of_first(environ["SLURM_STEP_NODELIST"])
    return Place(
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        cpus=max(1, int(cpus)),
        master=(address, int(environ.get("MASTER_PORT") or port_of(job, step))),
    )


def cpus_of_node(environ: Environ) -> int | None:
    """CPUs of this node that are the job's; None outside of SLURM."""
    return int(environ["SLURM_CPUS_ON_NODE"]) if "SLURM_CPUS_ON_NODE" in environ else None


def is_requeued() -> bool:
    """Tell whether SLURM has started this job before."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def job_id() -> str:
    """Name the job, with its task in an array; empty outside of SLURM."""
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
            raise UsageError(f"SLURM_STEP_TASKS_PER_NODE must be numbers such as 2(x3),1, got {text!r}. {REMEDY}")
        numbers += [int(match[1])] * int(match[2] or 1)
    return numbers


def port_of(job: int, step: int) -> int:
    """A port on which all tasks of a step agree unasked, and which other steps hardly use."""
    return FIRST_PORT + (job * 7 + step) % PORTS


def _address_of_first(nodes: str) -> str:
    """Ask for the address at which SLURM reaches the first node: its name need not resolve."""
    names = _ask("hostnames", nodes).split()
    if not names:
        raise UsageError(f"scontrol names no node in {nodes!r}. Set MASTER_ADDR to the first node's address.")
    found = re.search(r"\bNodeAddr=(\S+)", _ask("node", names[0]))
    return found[1] if found else names[0]


def _ask(what: str, of: str) -> str:
    command = ["scontrol", "show", what, of]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        why = f"{' '.join(command)} failed ({type(error).__name__})"
        raise UsageError(f"{why}, and only it knows where rank 0 runs. Set MASTER_ADDR to its address.") from None
