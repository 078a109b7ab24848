"""`mgpu-infer`: start torchrun with one process per GPU, and return the exit code that torchrun hides."""

import os
import runpy
import sys
import tempfile
from pathlib import Path

from mgpu_ddp.errors import Exit
from mgpu_ddp.session import EXIT_CODE_FILE

SHUTDOWN_TIMEOUT_S = 20
"""What torchrun waits before it kills workers: more than the 15 s in which they end by themselves after a signal."""


def main() -> None:
    """Run `mgpu_ddp.infer` under torchrun on this host: one process per GPU, one where there is none."""
    sys.exit(launch(sys.argv[1:]))


def launch(argv: list[str]) -> int:
    """Run torchrun's command line in this process and return rank 0's exit code."""
    import torch

    processes = max(1, torch.cuda.device_count())
    with tempfile.TemporaryDirectory(prefix="mgpu_ddp-") as folder:
        exit_code = Path(folder) / "exit_code"
        os.environ[EXIT_CODE_FILE] = str(exit_code)
        # By the environment, since torch 2.11 has no option for it.
        os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_TIMEOUT_S))
        options = [
            "--standalone",
            f"--nproc_per_node={processes}",
            "--local-addr=127.0.0.1",
            "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        ]
        sys.argv = ["torchrun", *options, "-m", "mgpu_ddp.infer", *argv]
        try:
            runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)
        except BaseException as error:
            # torchrun raises for a failed worker and for a signal alike: what it was, rank 0 has written down.
            code = int(exit_code.read_text()) if exit_code.exists() else int(Exit.FAILED)
            if code in (Exit.COMPLETE, Exit.FAILED) and not isinstance(error, SystemExit):
                raise
            return code
    return int(Exit.COMPLETE)
