"""`mgpu-infer`: start torchrun with one process per GPU, and return the exit code that torchrun hides."""

import os
import sys
import tempfile
from pathlib import Path

from mgpu_ddp.config.script import THIS_PACKAGE
from mgpu_ddp.distributed.launcher import OUTCOME_FILE, explained_torchrun, literal, num_processes
from mgpu_ddp.reporting.terminal import make_output_safe


def main() -> None:
    """Run `mgpu_ddp.infer`, or the script that is named first, under torchrun on this host: one process per GPU."""
    script, words = list(THIS_PACKAGE), sys.argv[1:]
    if words and words[0].endswith(".py") and "=" not in words[0]:
        script, words = words[:1], words[1:]
    make_output_safe()
    with tempfile.TemporaryDirectory(prefix="mgpu_ddp-") as folder:
        os.environ[OUTCOME_FILE] = str(Path(folder) / "outcome")
        code = explained_torchrun([f"--nproc_per_node={num_processes('auto')}", *script, *literal(words)])
    sys.exit(code)


if __name__ == "__main__":
    main()
