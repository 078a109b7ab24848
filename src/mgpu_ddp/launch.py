"""`mgpu-infer`: start torchrun with one process per GPU, and return the exit code that torchrun hides."""

import json
import os
import runpy
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mgpu_ddp.errors import Exit, PeerLostError
from mgpu_ddp.session import OUTCOME_FILE
from mgpu_ddp.signals import die_with_parent

SHUTDOWN_TIMEOUT_S = 20
"""What torchrun waits before it kills workers: more than the 15 s in which they end by themselves after a signal."""


def main() -> None:
    """Run `mgpu_ddp.infer` under torchrun on this host: one process per GPU, one where there is none."""
    with tempfile.TemporaryDirectory(prefix="mgpu_ddp-") as folder:
        told = Path(folder) / "outcome"
        os.environ[OUTCOME_FILE] = str(told)
        try:
            torchrun([f"--nproc_per_node={num_processes('auto')}", "-m", "mgpu_ddp.infer", *sys.argv[1:]])
            code = int(Exit.COMPLETE)
        except BaseException as error:
            # torchrun raises for a failed worker and for a signal alike: what it was, rank 0 has written down.
            outcome = outcome_in(told)
            code = int(outcome.get("exit_code", Exit.FAILED))
            # Of a rank that died torchrun knows more than the others do.
            said = code != Exit.COMPLETE and not str(outcome.get("reason")).startswith(PeerLostError.__name__)
            if not (outcome and said) and not isinstance(error, SystemExit):
                raise
    sys.exit(code)


def num_processes(wanted: int | str) -> int:
    """`nproc_per_node` with auto decided: one per GPU, one where there is none."""
    import torch

    return max(1, torch.cuda.device_count()) if wanted == "auto" else int(wanted)


def torchrun(argv: Sequence[str]) -> None:
    """Run torchrun's own command line in this process, for one host."""
    # By the environment, since torch 2.11 has no option for it.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_TIMEOUT_S))
    # What torchrun sets anyway for several processes, and says so in four lines.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # The store and the rendezvous stay on loopback: whoever reaches them can steer the job.
    options = ["--standalone", "--local-addr=127.0.0.1"]
    sys.argv = ["torchrun", *options, "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", *argv]
    runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)


def outcome_in(file: Path) -> dict[str, Any]:
    """What rank 0 left of its last job, and its exit code; nothing if it died."""
    try:
        return dict(json.loads(file.read_text()))
    except (FileNotFoundError, ValueError):
        return {}


if __name__ == "__main__":
    # torchrun for another process of this package, with which it ends.
    die_with_parent(os.getppid())
    torchrun(sys.argv[1:])
