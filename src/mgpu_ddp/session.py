"""One process's jobs, one after another; each ends alike on all ranks before the next begins.

Rank 0 alone runs Hydra. What Hydra composes is a job; the other ranks are told of it and of nothing else.
"""

import gc
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from mgpu_ddp import report
from mgpu_ddp.command import remove_empty
from mgpu_ddp.ending import fail_job
from mgpu_ddp.errors import Exit, PeerError, PeerFailedError, PeerLostError, StateError, UsageError
from mgpu_ddp.job import Job
from mgpu_ddp.signals import StopWish
from mgpu_ddp.world import World, leave, reason_of

log = logging.getLogger("mgpu_ddp")

LINGER_S = 3.0
EXIT_CODE_FILE = "MGPU_DDP_EXIT_CODE_FILE"
"""Where rank 0 leaves its exit code for `mgpu-infer`, because torchrun returns 1 for all but 0."""


class Session:
    """What happened so far, and how the process will leave."""

    def __init__(self, world: World, stop: StopWish, act: Callable[[Job], dict[str, Any]]) -> None:
        self.world, self.stop = world, stop
        self.outcomes: list[dict[str, Any]] = []
        self.made: list[Path] = []
        """Folders this launch made, deepest first."""
        self._act = act
        self._heard = True
        """Whether the other ranks wait for another job."""

    def lead(self, make: Callable[[], Job]) -> dict[str, Any]:
        """Make a job, run it on all ranks and return its outcome. Rank 0 only; the others `follow`."""
        try:
            job = make()
        except UsageError as error:
            self.world.share("next job", {"refused": str(error)})
            return self._refuse(error)
        self.world.share("next job", {"job": job.order()})
        return self.run_job(job)

    def end(self, error: BaseException | None) -> None:
        """Tell the other ranks that there are no more jobs. Rank 0 only."""
        if self._heard and not isinstance(error, PeerLostError):
            usage = str(error) if isinstance(error, UsageError) else None
            self.world.share("next job", {"usage": usage, "failed": None if error is None else reason_of(error)})

    def follow(self) -> None:
        """Run the jobs that rank 0 makes. All ranks but rank 0."""
        while True:
            order = self.world.share("next job", None)
            if "job" in order:
                self.run_job(Job.ordered(order["job"]))
            elif "refused" in order:
                self._refuse(UsageError(order["refused"]))
            elif order["usage"] is not None:
                raise UsageError(order["usage"])
            elif order["failed"] is not None:
                raise PeerFailedError(f"rank 0 of {self.world.size} raised {order['failed']}")
            else:
                return

    def run_job(self, job: Job) -> dict[str, Any]:
        """Run one job to an end that all ranks agree on, and return its outcome. Collective: every rank calls this.

        A user's mistake is told once, by rank 0. Anything else that fails raises, but in a sweep only the loss of
        a rank does: what failed alike on all ranks leaves the next job unharmed.
        """
        self.world.pulse.check()
        self.world.pulse.watch_alarm(f"alarm/{job.name}")
        try:
            with self.world.together(f"job {job.name}"):
                outcome = self._act(job)
        except UsageError as error:
            return self._refuse(error)
        except Exception as error:
            outcome = {"status": "failed", "exit_code": int(Exit.FAILED), "reason": reason_of(error)}
            if self.world.rank == 0:
                outcome = fail_job(job, reason_of(error))
            self.outcomes.append(outcome)
            if not job.in_sweep or isinstance(error, PeerLostError):
                self._heard = False
                raise
            _say(error)
            # Its frames hold the job's tensors.
            traceback.clear_frames(error.__traceback__)
        else:
            self.outcomes.append(outcome)
        if job.in_sweep:
            _let_go()
        return outcome

    def _refuse(self, error: UsageError) -> dict[str, Any]:
        """Print a user's mistake as the outcome of a job. Collective."""
        self.tell(error)
        self.outcomes.append({"status": "failed", "exit_code": int(error.exit_code), "reason": str(error)})
        return self.outcomes[-1]

    def tell(self, error: UsageError) -> None:
        """Print a user's mistake once; the other ranks go on only when it is out. Collective."""
        if self.world.rank == 0:
            print(f"mgpu_ddp: {error}", file=sys.stderr, flush=True)
        self.world.exchange("told", None)

    def sum_up(self, sweep_dir: str) -> None:
        """Print the JSON line that ends a sweep. Rank 0 only."""
        failed = sum(outcome["exit_code"] != Exit.COMPLETE for outcome in self.outcomes)
        status = "failed" if failed else "complete"
        counts = {"jobs": len(self.outcomes), "failed": failed, "exit_code": self.exit_code}
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
        if error is not None and not isinstance(error, UsageError):
            _say(error)
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


def _say(error: BaseException) -> None:
    """What went wrong, with no more words than it needs."""
    if isinstance(error, PeerError):
        log.warning("%s: %s", type(error).__name__, error)
    elif isinstance(error, StateError):
        log.error("%s", error)
    else:
        traceback.print_exception(error)


def _let_go() -> None:
    """Give back the memory of a job that is over."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
