"""`mgpu-infer`: start torchrun with one process per GPU, and return the exit code that torchrun hides."""

import os
import sys
import tempfile
from pathlib import Path

from mgpu_ddp.config.script import THIS_PACKAGE
from mgpu_ddp.distributed.launcher import OUTCOME_FILE, num_processes, outcome_in, torchrun
from mgpu_ddp.errors import Exit, PeerLostError
from mgpu_ddp.reporting.terminal import make_output_safe


def main() -> None:
    """Run `mgpu_ddp.infer`, or the script that is named first, under torchrun on this host: one process per GPU."""
    script, words = list(THIS_PACKAGE), sys.argv[1:]
    if words and words[0].endswith(".py") and "=" not in words[0]:
        script, words = words[:1], words[1:]
    make_output_safe()
    with tempfile.TemporaryDirectory(prefix="mgpu_ddp-") as folder:
        outcome_file = Path(folder) / "outcome"
        os.environ[OUTCOME_FILE] = str(outcome_file)
        try:
            torchrun([f"--nproc_per_node={num_processes('auto')}", *script, *words])
            code = int(Exit.COMPLETE)
        except BaseException as error:
            # torchrun raises for a failed worker and for a signal alike; rank 0 has written down which it was.
            outcome = outcome_in(outcome_file)
            code = int(outcome.get("exit_code", Exit.FAILED))
            # torchrun knows more about a rank that died than the other ranks do.
            is_lost = str(outcome.get("reason")).startswith(PeerLostError.__name__)
            is_explained = outcome and code != Exit.COMPLETE and not is_lost
            if not is_explained and not isinstance(error, SystemExit):
                raise
    sys.exit(code)


if __name__ == "__main__":
    main()
