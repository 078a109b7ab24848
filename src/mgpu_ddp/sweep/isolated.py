"""Run a job of a sweep in processes of its own, by torchrun or srun: a crash in it ends nothing else."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from mgpu_ddp.config.checks import require
from mgpu_ddp.config.compose import quote
from mgpu_ddp.distributed.command import COMMAND
from mgpu_ddp.distributed.launcher import OUTCOME_FILE, literal, num_processes, outcome_in
from mgpu_ddp.distributed.signals import StopWish
from mgpu_ddp.errors import Exit
from mgpu_ddp.reporting import console

POLL_S = 0.2


def run_isolated(
    program: Sequence[str], overrides: Sequence[str], again: Sequence[str], sweep_dir: Path, stop: StopWish
) -> dict[str, Any]:
    """Run the job that Hydra has composed in processes of its own and return its outcome.

    `program` are the arguments of the interpreter that start this program, and `again` is the command that continues
    the sweep.

    The ranks log into SWEEP/logs/<job>; this terminal shows the output of rank 0.

    Raises:
        UsageError: a setting of the launcher breaks its rule.
    """
    composed = HydraConfig.get()
    logs = sweep_dir / "logs" / str(composed.job.num)
    # In the sweep's folder, because the job may run on another host.
    outcome_file = logs / "outcome.json"
    words = [*program, *job_words(overrides, composed.runtime.output_dir)]
    is_torchrun = composed.launcher.kind == "torchrun"
    command = (
        [*_torchrun(composed.launcher, logs), *literal(words)] if is_torchrun else [*_srun(composed.launcher), *words]
    )
    logs.mkdir(parents=True, exist_ok=True)
    outcome_file.unlink(missing_ok=True)
    # stdout is for results, which this process prints.
    environ = _environ() | {OUTCOME_FILE: str(outcome_file), COMMAND: shlex.join(again)}
    child = subprocess.Popen(command, env=environ, stdout=sys.stderr)
    _wait(child, stop)
    outcome = outcome_in(outcome_file)
    if "status" not in outcome:
        reason = f"rank 0 left no outcome: {composed.launcher.kind} exited with {child.returncode}, logs are in {logs}"
        outcome = {"status": "failed", "exit_code": int(Exit.FAILED), "reason": reason}
    console.print_summary(outcome)
    return outcome


def job_words(overrides: Sequence[str], run_dir: str) -> list[str]:
    """The command line of one job of a sweep, with a folder of its own."""
    words = list(overrides)
    if not any(word.lstrip("+").startswith("runtime.on_oom=") for word in words):
        words.append("runtime.on_oom=raise")
    return [*words, f"hydra.run.dir={quote(run_dir)}"]


def _torchrun(launcher: Any, logs: Path) -> list[str]:
    processes, restarts = launcher.nproc_per_node, launcher.max_restarts
    ok = processes == "auto" or (isinstance(processes, int) and processes >= 1)
    remedy = "Try hydra.launcher.nproc_per_node=2."
    require(ok, "hydra.launcher.nproc_per_node", "at least 1 or auto", processes, remedy)
    remedy = "Try hydra.launcher.max_restarts=1."
    require(restarts >= 0, "hydra.launcher.max_restarts", "at least 0", restarts, remedy)
    return [
        *(sys.executable, "-m", "mgpu_ddp.distributed.launcher"),
        *(f"--nproc_per_node={num_processes(processes)}", f"--max-restarts={restarts}"),
        *(f"--log-dir={logs}", "--tee=3", "--local-ranks-filter=0"),
    ]


def _srun(launcher: Any) -> list[str]:
    """Source: srun(1)."""
    words = ["srun", "--kill-on-bad-exit=1"]
    for key, value in launcher.items():
        if key not in ("_target_", "kind") and value is not None:
            ok = re.fullmatch(r"[\w][\w.:,@/&|*+-]*", str(value)) is not None
            require(
                ok, f"hydra.launcher.{key}", "a plain value of srun's option", str(value), "Leave it out or set null."
            )
            words.append(f"--{key.replace('_', '-')}={value}")
    return [*words, sys.executable]


def _environ() -> dict[str, str]:
    """This environment without an allocation: srun is to ask for one of its own."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "SRUN_")) or name == "SLURM_CONF"
    }


def _wait(child: "subprocess.Popen[bytes]", stop: StopWish) -> None:
    """Wait for the job to end, and pass a wish to stop on to it, once."""
    while child.poll() is None and not stop:
        stop.wait(POLL_S)
    if child.poll() is None:
        # torchrun ends its workers on any signal; srun forwards this one, and would kill its tasks on SIGTERM.
        child.send_signal(signal.SIGUSR1)
    child.wait()
