"""torchrun's own command line, run in this process, and the outcome that its rank 0 leaves."""

import json
import logging
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mgpu_ddp.distributed.signals import die_with_parent, stop_signals
from mgpu_ddp.errors import Exit, PeerLostError

OUTCOME_FILE = "MGPU_DDP_OUTCOME_FILE"
"""The environment variable that names the file in which rank 0 leaves the outcome of its last job: torchrun itself
returns 1 for every exit code but 0."""
SHUTDOWN_TIMEOUT_S = 20
"""Time that torchrun gives workers before it kills them: after a signal they end by themselves within 15 s."""


def num_processes(wanted: int | str) -> int:
    """Decide `nproc_per_node`: auto is one process per GPU, one where there is none."""
    import torch

    return max(1, torch.cuda.device_count()) if wanted == "auto" else int(wanted)


def torchrun(argv: Sequence[str]) -> None:
    """Run torchrun's own command line in this process, for one host."""
    # Through the environment: torch 2.11 has no option for it.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_TIMEOUT_S))
    # torchrun sets it anyway for several processes, and prints four lines about it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # The store and the rendezvous stay on loopback: whoever reaches them can steer the job.
    options = ["--standalone", "--local-addr=127.0.0.1"]
    # torchrun passes them on to its workers.
    handled = ",".join(number.name for number in stop_signals())
    sys.argv = ["torchrun", *options, f"--signals-to-handle={handled}", *argv]
    runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)


def literal(words: Sequence[str]) -> list[str]:
    """Words that torchrun hands to its workers as they are: it takes $$ for $, and ${local_rank} for a number."""
    return [word.replace("$", "$$") for word in words]


def outcome_in(file: Path) -> dict[str, Any]:
    """Read what rank 0 left of its last job, with its status and exit code; without these if it died in it."""
    try:
        return dict(json.loads(file.read_text()))
    except (FileNotFoundError, ValueError):
        return {}


def explained_torchrun(argv: Sequence[str]) -> int:
    """Run torchrun and return rank 0's exit code, which torchrun hides. What rank 0 has not explained is raised."""
    file = Path(os.environ[OUTCOME_FILE])
    # torchrun would tell in a line of its own that a rank has failed.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(lambda _: not _is_explained(file))
    try:
        torchrun(argv)
    except BaseException as error:
        from torch.distributed.elastic.multiprocessing.api import SignalException

        # torchrun raises for a failed worker and for a signal alike; rank 0 has written down which it was.
        if not _is_explained(file) and not isinstance(error, SystemExit | SignalException):
            raise
        return int(outcome_in(file).get("exit_code", Exit.FAILED))
    return int(Exit.COMPLETE)


def _is_explained(file: Path) -> bool:
    """Tell whether rank 0 has said why it left. Of a rank that died torchrun knows more than the other ranks do."""
    outcome = outcome_in(file)
    is_lost = str(outcome.get("reason")).startswith(PeerLostError.__name__)
    return "status" in outcome and outcome.get("exit_code", Exit.FAILED) != Exit.COMPLETE and not is_lost


def main() -> None:
    """Be torchrun for another process of this package, and end with that."""
    die_with_parent(os.getppid())
    sys.exit(explained_torchrun(sys.argv[1:]))


if __name__ == "__main__":
    main()
