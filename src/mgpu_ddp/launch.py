"""`mgpu-infer`: start torchrun with one process per GPU, and return the exit code that torchrun hides."""

import os
import sys
import tempfile
from pathlib import Path

from mgpu_ddp.distributed.launcher import OUTCOME_FILE, num_processes, outcome_in, torchrun
from mgpu_ddp.errors import Exit, PeerLostError


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


if __name__ == "__main__":
    main()
