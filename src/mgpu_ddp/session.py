"""One process's jobs, one after another; each ends alike on all ranks before the next begins."""

import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from mgpu_ddp import report
from mgpu_ddp.command import remove_empty
from mgpu_ddp.ending import fail_job
from mgpu_ddp.errors import Exit, PeerError, StateError, UsageError
from mgpu_ddp.job import Job
from mgpu_ddp.signals import StopWish
from mgpu_ddp.world import World, leave, reason_of

log = logging.getLogger("mgpu_ddp")

LINGER_S = 3.0
EXIT_CODE_FILE = "MGPU_DDP_EXIT_CODE_FILE"
"""Where rank 0 leaves its exit code for `mgpu-infer`, because torchrun returns 1 for all but 0."""


class Session:
    """What happened so far, and how the process will leave."""

    def __init__(self, world: World, stop: StopWish) -> None:
        self.world, self.stop = world, stop
        self.outcomes: list[dict[str, Any]] = []
        self.made: list[Path] = []
        """Folders this launch made, deepest first."""

    def run_job(self, make: Callable[[str], Job], act: Callable[[Job], dict[str, Any]]) -> float | None:
        """Run one job to an end that all ranks agree on, and return its images/s.

        A user's mistake is told once, by rank 0, and returns None. Anything else that fails raises.
        """
        self.world.pulse.check()
        name = str(len(self.outcomes))
        self.world.pulse.watch_alarm(f"alarm/{name}")
        jobs: list[Job] = []
        try:
            with self.world.together(f"job {name}"):
                jobs.append(make(name))
                summary = act(jobs[0])
        except UsageError as error:
            self.tell(error)
            self.outcomes.append({"status": "failed", "exit_code": int(error.exit_code), "reason": str(error)})
            return None
        except Exception as error:
            outcome = {"status": "failed", "exit_code": int(Exit.FAILED), "reason": reason_of(error)}
            self.outcomes.append(fail_job(jobs[0], reason_of(error)) if self.world.rank == 0 and jobs else outcome)
            raise
        self.outcomes.append(summary)
        return float(summary.get("images_per_s", 0.0))

    def tell(self, error: UsageError) -> None:
        """Print a user's mistake once; the other ranks go on only when it is out. Collective."""
        if self.world.rank == 0:
            print(f"mgpu_ddp: {error}", file=sys.stderr, flush=True)
        self.world.exchange("told", None)

    def sum_up(self, sweep_dir: str) -> None:
        """Print the JSON line that ends a sweep. Rank 0 prints."""
        failed = sum(outcome["exit_code"] != Exit.COMPLETE for outcome in self.outcomes)
        status = "failed" if failed else "complete"
        counts = {"jobs": len(self.outcomes), "failed": failed, "exit_code": self.exit_code}
        if self.world.rank == 0:
            report.print_summary({"status": status, **counts, "sweep_dir": sweep_dir})

    @property
    def exit_code(self) -> int:
        """The worst ending of all jobs."""
        codes = {int(outcome["exit_code"]) for outcome in self.outcomes}
        order = [Exit.FAILED, Exit.USAGE, Exit.TOO_MANY_ERRORS, Exit.PREEMPTED]
        return next((int(code) for code in order if code in codes), int(Exit.COMPLETE))

    def depart(self, error: BaseException | None) -> NoReturn:
        """Leave the process with the exit code that says how it went; after a failure, with its cause."""
        code = self.exit_code if error is None else getattr(error, "exit_code", Exit.FAILED)
        if isinstance(error, PeerError):
            log.warning("%s: %s", type(error).__name__, error)
        elif isinstance(error, StateError):
            log.error("%s", error)
        elif error is not None and not isinstance(error, UsageError):
            traceback.print_exception(error)
        if self.world.rank == 0 and EXIT_CODE_FILE in os.environ:
            Path(os.environ[EXIT_CODE_FILE]).write_text(str(int(code)))
        if isinstance(error, UsageError):
            self.tell(error)
        # What was refused, or only planned, leaves no trace.
        remove_empty(self.made)
        if error is None or isinstance(error, UsageError):
            leave(self.world)
        elif isinstance(error, PeerError):
            # The launcher names the rank that leaves first as the root cause: that must not be this one.
            self.stop.wait(LINGER_S)
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        # Finalising would wait for threads inside a collective that lost its peer, and for stuck loader workers.
        os._exit(int(code))
