"""A job in processes of its own, by torchrun or by srun: what crashes in it ends nothing else."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from mgpu_ddp.config.checks import require
from mgpu_ddp.config.compose import quote
from mgpu_ddp.distributed.launcher import OUTCOME_FILE, num_processes, outcome_in
from mgpu_ddp.distributed.signals import StopWish
from mgpu_ddp.errors import Exit
from mgpu_ddp.reporting import console

POLL_S = 0.2


def run_apart(overrides: Sequence[str], sweep_dir: Path, stop: StopWish) -> dict[str, Any]:
    """Run the job that Hydra has composed in processes of its own and return its outcome.

    Its log files are in SWEEP/logs/<job>; on this terminal it shows what its rank 0 says.

    Raises:
        UsageError: a setting of the launcher breaks its rule.
    """
    composed = HydraConfig.get()
    logs = sweep_dir / "logs" / str(composed.job.num)
    # Where the job's own host can write to, which may be another one.
    told = logs / "outcome.json"
    start = (_torchrun if composed.launcher.kind == "torchrun" else _srun)(composed.launcher, logs)
    command = [*start, "-m", "mgpu_ddp.infer", *job_words(overrides, composed.runtime.output_dir)]
    logs.mkdir(parents=True, exist_ok=True)
    told.unlink(missing_ok=True)
    # A job is to have an allocation of its own also where this process is in one.
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SRUN_"))}
    environ |= {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    # stdout is for what this process has to say.
    child = subprocess.Popen(command, env=environ | {OUTCOME_FILE: str(told)}, stdout=sys.stderr)
    asked = False
    while child.poll() is None:
        stop.wait(POLL_S) if not asked else _wait(child)
        if stop and not asked:
            # torchrun takes any signal as the wish to end; srun passes this one on, and would kill its tasks for TERM.
            child.send_signal(signal.SIGUSR1)
            asked = True
    outcome = outcome_in(told)
    if "status" not in outcome:
        reason = f"rank 0 left no word, {composed.launcher.kind} ended with {child.returncode}; its log is in {logs}"
        outcome = {"status": "failed", "exit_code": int(Exit.FAILED), "reason": reason}
    console.print_summary(outcome)
    return outcome


def job_words(overrides: Sequence[str], run_dir: str) -> list[str]:
    """The command line of one job of a sweep, in a folder of its own."""
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


def _srun(launcher: Any, logs: Path) -> list[str]:
    """Source: srun(1)."""
    words = ["srun", "--kill-on-bad-exit=1"]
    for key, value in launcher.items():
        if key not in ("_target_", "kind") and value is not None:
            ok = re.fullmatch(r"[\w][\w.:,@/&|*+-]*", str(value)) is not None
            require(ok, f"hydra.launcher.{key}", "what srun may take", str(value), "Leave it out for null.")
            words.append(f"--{key.replace('_', '-')}={value}")
    return [*words, sys.executable]


def _wait(child: "subprocess.Popen[bytes]") -> None:
    try:
        child.wait(POLL_S)
    except subprocess.TimeoutExpired:
        return
