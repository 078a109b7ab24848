"""A job under a torchrun of its own: what crashes in it ends nothing else."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from mgpu_ddp import report
from mgpu_ddp.command import quote
from mgpu_ddp.config import require
from mgpu_ddp.errors import Exit
from mgpu_ddp.launch import num_processes, outcome_in
from mgpu_ddp.session import OUTCOME_FILE
from mgpu_ddp.signals import StopWish

POLL_S = 0.2


def run_apart(overrides: Sequence[str], sweep_dir: Path, stop: StopWish) -> dict[str, Any]:
    """Run the job that Hydra has composed under a torchrun of its own and return its outcome.

    Its log files are in SWEEP/logs/<job>; on this terminal it shows what its rank 0 says.

    Raises:
        UsageError: a setting of the launcher breaks its rule.
    """
    composed = HydraConfig.get()
    logs = sweep_dir / "logs" / str(composed.job.num)
    command = [sys.executable, "-m", "mgpu_ddp.launch", *_options(composed.launcher), f"--log-dir={logs}"]
    command += ["-m", "mgpu_ddp.infer", *job_words(overrides, composed.runtime.output_dir)]
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mgpu_ddp-") as folder:
        told = Path(folder) / "outcome"
        # stdout is for what this process has to say.
        child = subprocess.Popen(command, env=os.environ | {OUTCOME_FILE: str(told)}, stdout=sys.stderr)
        asked = False
        while child.poll() is None:
            stop.wait(POLL_S) if not asked else _wait(child)
            if stop and not asked:
                child.send_signal(signal.SIGTERM)
                asked = True
        outcome = outcome_in(told)
    if "status" not in outcome:
        reason = f"rank 0 left no word, torchrun ended with {child.returncode}; its log is in {logs}"
        outcome = {"status": "failed", "exit_code": int(Exit.FAILED), "reason": reason}
    report.print_summary(outcome)
    return outcome


def job_words(overrides: Sequence[str], run_dir: str) -> list[str]:
    """The command line of one job of a sweep, in a folder of its own."""
    words = list(overrides)
    if not any(word.lstrip("+").startswith("runtime.on_oom=") for word in words):
        words.append("runtime.on_oom=raise")
    return [*words, f"hydra.run.dir={quote(run_dir)}"]


def _options(launcher: Any) -> list[str]:
    processes, restarts = launcher.nproc_per_node, launcher.max_restarts
    ok = processes == "auto" or (isinstance(processes, int) and processes >= 1)
    remedy = "Try hydra.launcher.nproc_per_node=2."
    require(ok, "hydra.launcher.nproc_per_node", "at least 1 or auto", processes, remedy)
    remedy = "Try hydra.launcher.max_restarts=1."
    require(restarts >= 0, "hydra.launcher.max_restarts", "at least 0", restarts, remedy)
    return [
        f"--nproc_per_node={num_processes(processes)}",
        f"--max-restarts={restarts}",
        "--tee=3",
        "--local-ranks-filter=0",
    ]


def _wait(child: "subprocess.Popen[bytes]") -> None:
    try:
        child.wait(POLL_S)
    except subprocess.TimeoutExpired:
        return
