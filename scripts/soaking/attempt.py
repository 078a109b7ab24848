"""One attempt at a job: forked ranks, one of which, or all, are killed on the way.

The ranks run the real command in a world of real gloo over loopback. Of what a launcher would do for them, one thing is
done here: ranks that have not joined yet when another one dies are killed, because they would wait for it until the
store's own timeout. Those that have joined have to end by themselves.
"""

import faulthandler
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common.processes import children, kill_sessions, living

from soaking.jobs import LOST_AFTER_S
from tests.support.forks import fork
from tests.support.starting import committed_rows, places_in_world

HANG_S = LOST_AFTER_S + 26.0
"""How long after a kill the survivors may take to end: far more than they need, on a machine that others use too."""
CALM_S = 120.0
"""How long an attempt may take in which nothing is killed."""
LEFT_S = 5.0
"""How long what a rank has started may outlive it."""
POLL_S = 0.005
OPERATIONS = {"fsync": 0, "link": 1, "replace": 1, "unlink": 0}
"""The functions of os that make something durable, with the argument that names what they change."""
JOINED, DIED, ENDED = Path("joined"), Path("died"), Path("ended")
"""Left by a rank in its working folder: that it has joined, at which operation it died, how it ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kill:
    """Who is to die, and when: at a number of operations on the disk, or at a number of committed rows and a bit."""

    whom: str
    """one rank, rank 0, all ranks, or a loader worker."""
    rank: int
    operation: int = 0
    before: bool = False
    """Before the operation or after it."""
    rows: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How an attempt ended."""

    complete: bool
    """Every rank said so."""
    killed: bool
    """The kill came before the end."""
    joined: bool
    """The killed rank had joined the world."""
    operation: str
    """At which it died, if at one."""
    survivors: dict[int, str]
    """How the ranks that nobody killed ended."""
    survivors_s: float
    """From the kill to the last rank's end."""
    hung: list[int]
    left: list[int]
    """Processes that outlived all ranks."""


class Attempt:
    """Ranks of a job, until all have ended."""

    def __init__(
        self, settings: list[str], run_dir: Path, size: int, kill: Kill | None, out: Path, rng: random.Random
    ) -> None:
        self._run_dir, self._kill, self._rng = run_dir, kill, rng
        self._folders = [out / f"rank{rank}" for rank in range(size)]
        for folder in self._folders:
            folder.mkdir(parents=True)
        self._started = time.monotonic()
        self._ranks = [
            fork(run_rank, kill if kill and kill.rank == rank else None, *settings, cwd=folder, **place)
            for rank, (folder, place) in enumerate(zip(self._folders, places_in_world(size), strict=True))
        ]
        self._victims: set[int] = set()
        self._due: float | None = None
        self._killed_at: float | None = None

    def until_the_end(self) -> Ended:
        """Kill what is to be killed, and wait for all ranks."""
        hung: list[int] = []
        sessions = {rank.pid for rank in self._ranks}
        try:
            while alive := self._alive():
                self._strike(alive)
                if self._is_over_time():
                    hung = sorted(alive)
                    for rank in hung:
                        # They write down where they are.
                        self._ranks[rank].send_signal(signal.SIGUSR2)
                    time.sleep(1.0)
                    break
                time.sleep(POLL_S)
            ended = time.monotonic()
            left = [] if hung else _left_of(sessions)
        finally:
            kill_sessions(sessions)
        said = {rank: self._said(rank) for rank in range(len(self._ranks))}
        victim = self._folders[self._kill.rank] if self._kill else None
        return Ended(
            complete=all(text == "complete" for text in said.values()),
            killed=self._killed_at is not None,
            joined=victim is not None and (victim / JOINED).exists(),
            operation=(victim / DIED).read_text() if victim is not None and (victim / DIED).exists() else "",
            survivors={rank: text for rank, text in said.items() if rank not in self._victims},
            survivors_s=ended - self._killed_at if self._killed_at is not None else 0.0,
            hung=hung,
            left=left,
        )

    def _alive(self) -> set[int]:
        alive = {number for number, rank in enumerate(self._ranks) if rank.poll() is None}
        kill = self._kill
        if kill and kill.operation and self._killed_at is None and self._ranks[kill.rank].poll() == -signal.SIGKILL:
            # It died at an operation of its own.
            self._struck({kill.rank}, alive)
        return alive

    def _strike(self, alive: set[int]) -> None:
        kill, now = self._kill, time.monotonic()
        if kill is None or kill.operation or self._killed_at is not None or kill.rank not in alive:
            return
        if self._due is None and committed_rows(self._run_dir) >= kill.rows:
            self._due = now + kill.seconds
        if self._due is None or now < self._due:
            return
        if kill.whom != "a loader worker":
            self._ranks[kill.rank].kill()
            self._struck({kill.rank}, alive)
        elif workers := children(self._ranks[kill.rank].pid):
            os.kill(self._rng.choice(workers), signal.SIGKILL)
            self._killed_at = now

    def _struck(self, victims: set[int], alive: set[int]) -> None:
        assert self._kill is not None
        self._killed_at = time.monotonic()
        waiting = {rank for rank in alive if not (self._folders[rank] / JOINED).exists()}
        others = alive if self._kill.whom == "all ranks" else waiting
        for rank in others:
            self._ranks[rank].kill()
        self._victims = victims | others

    def _is_over_time(self) -> bool:
        now = time.monotonic()
        if self._killed_at is not None:
            return now - self._killed_at > HANG_S
        return now - self._started > CALM_S

    def _said(self, rank: int) -> str:
        path = self._folders[rank] / ENDED
        return path.read_text() if path.exists() else f"exit code {self._ranks[rank].poll()}"


def _left_of(sessions: set[int]) -> list[int]:
    """List live processes of the ranks' sessions, once they had time to notice that their ranks are dead."""
    deadline = time.monotonic() + LEFT_S
    while left := [process.pid for process in living() if process.session in sessions]:
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    return left


def run_rank(kill: Kill | None, *settings: str) -> None:
    """Be `python -m mgpu_ddp.infer` in a forked process that leaves notes, and die at an operation if that is asked."""
    from mgpu_ddp import cli, infer
    from mgpu_ddp.config.script import Script
    from mgpu_ddp.distributed.world import World
    from mgpu_ddp.job import session

    join, depart = cli.join, session.Session.depart

    def noted_join() -> World:
        world = join()
        JOINED.touch()
        return world

    def noted_depart(self: session.Session, error: BaseException | None) -> None:
        failed = "" if self.exit_code == 0 else f"exit code {self.exit_code}"
        ENDED.write_text(type(error).__name__ if error is not None else failed or "complete")
        depart(self, error)

    cli.join = noted_join
    session.Session.depart = noted_depart
    # There is no launcher that would take who leaves first for the root cause.
    session.LINGER_S = 0.0
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    if kill is not None and kill.operation:
        _die_at(kill)
    sys.argv = [infer.__file__, *settings]
    cli.main(infer.infer, Script())


def _die_at(kill: Kill) -> None:
    """Count all that makes something durable, and die before or after the chosen operation."""
    own, count = os.getpid(), 0

    def counted(name: str, function: Callable[..., Any], target: int) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            # Loader workers inherit this, and what they do is no commit.
            if os.getpid() != own:
                return function(*args, **options)
            count += 1
            dies, what = count == kill.operation, f"{name} {_sort(args[target])}"
            if dies and kill.before:
                _die(f"before {what}")
            result = function(*args, **options)
            if dies:
                _die(f"after {what}")
            return result

        return call

    for name, target in OPERATIONS.items():
        setattr(os, name, counted(name, getattr(os, name), target))
    np.memmap.flush = counted("flush", np.memmap.flush, 0)


def _die(operation: str) -> None:
    DIED.write_text(operation)
    os.kill(os.getpid(), signal.SIGKILL)


def _sort(target: Any) -> str:
    """Name the kind of thing that an operation changes, for counting."""
    if isinstance(target, np.memmap):
        return "rows"
    path = Path(os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target)
    name = path.name.removeprefix(".")
    kinds = {"part-": "part", "predictions.npy": "array", "manifest": "manifest", "status": "status"}
    found = (kind for start, kind in kinds.items() if name.startswith(start))
    return next(found, "folder" if path.is_dir() else "other")
