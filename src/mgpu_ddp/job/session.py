"""The jobs of one process, one after another; each ends alike on all ranks before the next begins.

Rank 0 leads: it alone runs Hydra, which composes the jobs. The other ranks follow: they are told of jobs and of nothing
else.
"""

import ctypes
import errno
import gc
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from mgpu_ddp.config.script import Script
from mgpu_ddp.distributed.command import StartCommand
from mgpu_ddp.distributed.host import peaks
from mgpu_ddp.distributed.launcher import OUTCOME_FILE
from mgpu_ddp.distributed.signals import StopWish
from mgpu_ddp.distributed.world import World, leave
from mgpu_ddp.errors import (
    Exit,
    HangError,
    OutOfMemoryError,
    PeerError,
    PeerFailedError,
    PeerLostError,
    StateError,
    UsageError,
    reason_of,
    words_past,
)
from mgpu_ddp.job.cache import Kept
from mgpu_ddp.job.job import Job
from mgpu_ddp.output.folders import remove_empty
from mgpu_ddp.output.layout import NEXT
from mgpu_ddp.output.manifest import STATUS
from mgpu_ddp.output.run_folder import mark_lost
from mgpu_ddp.reporting import console
from mgpu_ddp.reporting.terminal import print_mistake, print_next, print_traceback

log = logging.getLogger("mgpu_ddp")

LINGER_S = 3.0


class Session:
    """Runs jobs, remembers how they ended, and leaves as follows from that."""

    def __init__(
        self,
        world: World,
        stop: StopWish,
        kept: Kept,
        script: Script,
        act: Callable[[Job], dict[str, Any]],
        start: StartCommand | None = None,
    ) -> None:
        self.world, self.stop, self.script, self.start = world, stop, script, start
        self._kept = kept
        self.outcomes: list[dict[str, Any]] = []
        self.made: list[Path] = []
        """Folders this launch made, deepest first."""
        self._act = act
        self._others_wait = True
        """The other ranks wait for another job."""
        self._job: Job | None = None
        """The last one that was run."""

    def lead(self, make: Callable[[], Job], apart: Callable[[], dict[str, Any]] | None = None) -> dict[str, Any]:
        """Make a job, run it on all ranks and return its outcome. Rank 0 only; the others `follow`.

        With `apart` it runs in processes of its own, once its configuration has been checked.
        """
        try:
            job = make()
        except UsageError as error:
            self.world.share("next job", {"refused": str(error)})
            return self._refuse(error)
        if apart is not None:
            self.outcomes.append(apart())
            return self.outcomes[-1]
        self.world.share("next job", {"job": job.order()})
        return self.run_job(job)

    def end(self, error: BaseException | None) -> None:
        """Tell the other ranks that there are no more jobs. Rank 0 only."""
        if self._others_wait and not isinstance(error, PeerLostError):
            usage = str(error) if isinstance(error, UsageError) else None
            self.world.share("next job", {"usage": usage, "failed": None if error is None else reason_of(error)})

    def follow(self) -> UsageError | None:
        """Run the jobs that rank 0 makes; return the user's mistake that ended them, if any. All but rank 0."""
        while True:
            order = self.world.share("next job", None)
            if "job" in order:
                self.run_job(Job.ordered(order["job"], self.script))
            elif "refused" in order:
                self._refuse(UsageError(order["refused"]))
            elif order["usage"] is not None:
                return UsageError(order["usage"])
            elif order["failed"] is not None:
                raise PeerFailedError(f"rank 0 of {self.world.size} raised {order['failed']}")
            else:
                return None

    def run_job(self, job: Job) -> dict[str, Any]:
        """Run one job to an end that all ranks agree on, and return its outcome. Collective: every rank calls this.

        A user's mistake is told once, by rank 0. Anything else that fails raises, but in a sweep only the loss of
        a rank or a device does: what failed alike on all ranks leaves the next job unharmed.
        """
        self.world.heartbeat.check()
        self.world.heartbeat.watch_alarm(f"alarm/{job.name}")
        self._job = job
        # For the launcher, which outlives this process.
        self._leave_word({"run_dir": str(job.run_dir), "next": job.next_command()})
        try:
            with self.world.together(f"job {job.name}"):
                outcome = self._act(job)
        except UsageError as error:
            self._kept.forget()
            return self._refuse(error)
        except Exception as error:
            self._kept.forget()
            again = self._next_after(job, error)
            outcome = {"status": "failed", "exit_code": int(Exit.FAILED), "reason": reason_of(error), "next": again}
            raised = not job.in_sweep or isinstance(error, PeerLostError | HangError)
            if not raised:
                _log_error(error)
                outcome |= self._what_failed(error)
            if self.world.rank == 0:
                outcome |= {"run_dir": str(job.run_dir)}
                console.print_summary(outcome)
            self.outcomes.append(outcome)
            if raised:
                self._others_wait = False
                raise
            forget_frames(error)
        else:
            self.outcomes.append(outcome)
        if job.in_sweep:
            _free_memory()
        return outcome

    def _next_after(self, job: Job, error: Exception) -> str | None:
        """The command that goes on after an error: in the run folder, or as it was typed where none was claimed."""
        words = words_past(error)
        if isinstance(error, OutOfMemoryError) and not words:
            # The same command would end the same way.
            return None
        try:
            begun = any((folder / STATUS).exists() for folder in (job.run_dir, job.run_dir / NEXT))
        except OSError:
            begun = True
        return job.next_command(words) if begun or job.in_sweep else job.typed_command(words)

    def _leave_word(self, outcome: dict[str, Any]) -> None:
        """Leave an outcome for the process that asked for it. Rank 0 only."""
        if self.world.rank == 0 and OUTCOME_FILE in os.environ:
            Path(os.environ[OUTCOME_FILE]).write_text(json.dumps(outcome))

    def _what_failed(self, error: Exception) -> dict[str, Any]:
        """Describe a failure by the rank that could not go on, with the most memory that any rank used. Collective."""
        # torch's own error for a lack of memory has the same name as ours.
        oom = type(error).__name__ == OutOfMemoryError.__name__ or isinstance(error, MemoryError)
        oom = oom or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        mine = {"oom": oom, "peer": isinstance(error, PeerError), "reason": reason_of(error)}
        told = self.world.exchange("what failed", mine | peaks())
        rank = next((rank for rank, other in enumerate(told) if not other["peer"]), 0)
        where = f"rank {rank} of {self.world.size}: " if self.world.size > 1 else ""
        return {
            "status": "oom" if told[rank]["oom"] else "failed",
            "reason": where + told[rank]["reason"],
            **{name: max(other[name] for other in told) for name in peaks()},
        }

    def _refuse(self, error: UsageError) -> dict[str, Any]:
        """Print a user's mistake as the outcome of a job. Collective."""
        self._tell(error)
        self.outcomes.append({"status": "failed", "exit_code": int(error.exit_code), "reason": str(error)})
        return self.outcomes[-1]

    def _tell(self, error: UsageError) -> None:
        """Print a user's mistake once; the other ranks go on only when it is out. Collective."""
        if self.world.rank == 0:
            print_mistake(error)
        self.world.exchange("told", None)

    def _last_outcome(self) -> dict[str, Any]:
        """The outcome to tell of: the last one, or the last that was not complete."""
        bad = [outcome for outcome in self.outcomes if outcome["status"] != "complete"]
        return (bad or self.outcomes or [{}])[-1]

    def _stand_in(self, error: PeerLostError) -> None:
        """Say in the place of rank 0, where that is lost, how the job ended and how to go on. One rank does."""
        job, again = self._job, self._job.next_command() if self._job is not None else None
        if job is None or not self.world.stands_in_for_rank_0(error):
            return
        try:
            mark_lost(job.run_dir, reason_of(error))
        except (OSError, UsageError) as why:
            log.error("%s could not be marked as failed: %s", job.run_dir, why)
        if OUTCOME_FILE not in os.environ:
            print_next({"status": "failed", "next": again})

    @property
    def exit_code(self) -> int:
        """The worst of all jobs' exit codes; in a sweep, running out of memory counts only where no job did better."""
        outcomes = [outcome for outcome in self.outcomes if outcome["status"] != "oom"] or self.outcomes
        codes = {int(outcome["exit_code"]) for outcome in outcomes}
        order = [Exit.FAILED, Exit.USAGE, Exit.TOO_MANY_ERRORS, Exit.PREEMPTED]
        return next((int(code) for code in order if code in codes), int(Exit.COMPLETE))

    def depart(self, error: BaseException | None) -> None:
        """Leave the world, and unless all went well the process: with the exit code that says how it went."""
        code = self.exit_code if error is None else getattr(error, "exit_code", Exit.FAILED)
        if error is not None and not isinstance(error, UsageError):
            _log_error(error)
        refused = {"status": "failed", "reason": str(error)} if isinstance(error, UsageError) else {}
        last = self._last_outcome() or refused
        self._leave_word({**last, "exit_code": int(code)})
        if error is not None and self.world.attempt < int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
            log.info("torchrun starts the ranks again")
        elif self.world.rank == 0 and OUTCOME_FILE not in os.environ:
            print_next(last)
        elif isinstance(error, PeerLostError):
            self._stand_in(error)
        if isinstance(error, UsageError):
            self._tell(error)
        # What was refused, or only planned, leaves no trace.
        remove_empty(self.made)
        if error is None or isinstance(error, UsageError):
            leave(self.world)
        elif isinstance(error, PeerError):
            # The launcher names the rank that leaves first as the root cause: that must not be this one.
            self.stop.wait(LINGER_S)
        if code != Exit.COMPLETE:
            end_process(int(code))


def end_process(code: int) -> NoReturn:
    """Leave the process at once.

    Finalising would wait for threads inside a collective that lost its peer, and for stuck loader workers.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _log_error(error: BaseException) -> None:
    """Log an error: with a traceback only where one helps."""
    if isinstance(error, PeerError):
        log.warning("%s: %s", type(error).__name__, error)
    elif isinstance(error, StateError):
        log.error("%s", error)
    else:
        print_traceback(error)


def forget_frames(error: BaseException | None) -> None:
    """Free what the frames of an error and of its causes hold, such as the job's tensors."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _free_memory() -> None:
    """Free the memory of a job that is over."""
    gc.collect()
    # Memory that the C library keeps would count as the next job's.
    ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
