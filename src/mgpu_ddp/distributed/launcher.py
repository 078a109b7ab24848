"""torchrun's own command line, run in this process, and what its rank 0 leaves of the outcome."""

import json
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mgpu_ddp.distributed.signals import die_with_parent

SHUTDOWN_TIMEOUT_S = 20
"""What torchrun waits before it kills workers: more than the 15 s in which they end by themselves after a signal."""


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


OUTCOME_FILE = "MGPU_DDP_OUTCOME_FILE"
"""Where rank 0 leaves the outcome of its last job for whoever started torchrun, which returns 1 for all but 0."""


if __name__ == "__main__":
    # torchrun for another process of this package, with which it ends.
    die_with_parent(os.getppid())
    torchrun(sys.argv[1:])
