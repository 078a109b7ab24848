"""`mgpu-infer`: start torchrun with one process per GPU, and return the exit code that torchrun hides."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from mgpu_ddp.config.script import THIS_PACKAGE
from mgpu_ddp.distributed.launcher import OUTCOME_FILE, explained_torchrun, literal, num_processes, outcome_in
from mgpu_ddp.errors import Exit, MgpuError
from mgpu_ddp.output.run_folder import mark_lost
from mgpu_ddp.reporting.terminal import make_output_safe, print_mistake, print_next, print_traceback
from mgpu_ddp.version import version_text


def main() -> None:
    """Run `mgpu_ddp.infer`, or the script that is named first, under torchrun on this host: one process per GPU."""
    script, words = list(THIS_PACKAGE), sys.argv[1:]
    if words and words[0].endswith(".py") and "=" not in words[0]:
        script, words = words[:1], words[1:]
    make_output_safe()
    if words == ["--version"]:
        # Without starting a process for each GPU.
        print(version_text())
        return
    with tempfile.TemporaryDirectory(prefix="mgpu_ddp-") as folder:
        file = Path(folder) / "outcome"
        os.environ[OUTCOME_FILE] = str(file)
        try:
            code = explained_torchrun([f"--nproc_per_node={num_processes('auto')}", *script, *literal(words)])
        except Exception as error:
            print_traceback(error)
            code = int(Exit.FAILED)
        tell(outcome_in(file))
    sys.exit(code)


def tell(outcome: dict[str, Any]) -> None:
    """Say how to go on after what rank 0 has left, and mark its job as failed where it died."""
    if "status" not in outcome and "run_dir" in outcome:
        outcome["status"] = "failed"
        try:
            mark_lost(Path(outcome["run_dir"]), "rank 0 died")
        except (MgpuError, OSError) as error:
            print_mistake(error)
    print_next(outcome)


if __name__ == "__main__":
    main()
