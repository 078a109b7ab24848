"""One attempt at a job: ranks forked from this preloaded process, one of which, or all, are killed on the way.

The ranks are real processes in a world of real gloo over loopback. Of what a launcher would do for them, one thing is
done here: ranks that have not joined yet when another one dies are killed, because they would wait for it until the
store's own timeout. Those that have joined have to end by themselves.
"""

import ctypes
import faulthandler
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common.processes import children, living

from mgpu_ddp.config.schema import Config
from soaking.jobs import LOST_AFTER_S, committed

HANG_S = LOST_AFTER_S + 26.0
"""How long after a kill the survivors may take to end: far more than they need, on a machine that others use too."""
CALM_S = 120.0
"""How long an attempt may take in which nothing is killed."""
LEFT_S = 5.0
"""How long what a rank has started may outlive it."""
POLL_S = 0.005
OPERATIONS = {"fsync": 0, "link": 1, "replace": 1, "unlink": 0}
"""The functions of os that make something durable, with the argument that names what they change."""


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
    """Every rank said so and left by itself."""
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


class Note(ctypes.Structure):
    """What a rank leaves for this process to read once it is dead, in shared memory."""

    _fields_ = (("joined", ctypes.c_bool), ("died", ctypes.c_char * 48))


def attempt(config: Config, run_dir: Path, size: int, kill: Kill | None, out: Path, rng: random.Random) -> Ended:
    """Run a job with `size` ranks until all have ended, and kill what is to be killed."""
    out.mkdir(parents=True)
    notes = multiprocessing.RawArray(Note, size)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks: list[int] = []
    sys.stdout.flush()
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            try:
                os.setpgid(0, ranks[0] if ranks else 0)
                _Rank(rank, size, notes[rank], kill, out).live(config, run_dir, port)
            finally:
                os._exit(70)
        os.setpgid(pid, ranks[0] if ranks else pid)
        ranks.append(pid)
    return _Watch(ranks, notes, kill, run_dir, out, rng).until_the_end()


class _Watch:
    """What the parent of the ranks sees and does."""

    def __init__(
        self, ranks: list[int], notes: Any, kill: Kill | None, run_dir: Path, out: Path, rng: random.Random
    ) -> None:
        self._ranks, self._notes, self._kill = ranks, notes, kill
        self._run_dir, self._out, self._rng = run_dir, out, rng
        self._started = time.monotonic()
        self._alive = set(range(len(ranks)))
        self._codes: dict[int, int] = {}
        self._victims: set[int] = set()
        self._due: float | None = None
        self._killed_at: float | None = None

    def until_the_end(self) -> Ended:
        hung: list[int] = []
        try:
            while self._alive:
                self._reap()
                self._strike()
                if not hung and self._is_over_time():
                    hung = sorted(self._alive)
                    self._end_hung()
                time.sleep(POLL_S)
        except BaseException:
            os.killpg(self._ranks[0], signal.SIGKILL)
            raise
        return self._judge(hung)

    def _reap(self) -> None:
        for rank in sorted(self._alive):
            pid, status = os.waitpid(self._ranks[rank], os.WNOHANG)
            if pid:
                self._alive.discard(rank)
                self._codes[rank] = os.waitstatus_to_exitcode(status)
                if self._codes[rank] == -signal.SIGKILL and rank not in self._victims:
                    # It died at an operation of its own.
                    self._struck({rank})

    def _strike(self) -> None:
        kill, now = self._kill, time.monotonic()
        if kill is None or kill.operation or self._killed_at is not None or kill.rank not in self._alive:
            return
        if self._due is None and committed(self._run_dir) >= kill.rows:
            self._due = now + kill.seconds
        if self._due is None or now < self._due:
            return
        if kill.whom == "a loader worker":
            workers = children(self._ranks[kill.rank])
            if workers:
                os.kill(self._rng.choice(workers), signal.SIGKILL)
                self._struck(set())
        elif kill.whom == "all ranks":
            os.killpg(self._ranks[0], signal.SIGKILL)
            self._struck(set(self._alive))
        else:
            os.kill(self._ranks[kill.rank], signal.SIGKILL)
            self._struck({kill.rank})

    def _struck(self, victims: set[int]) -> None:
        self._victims |= victims
        if self._killed_at is None:
            self._killed_at = time.monotonic()
        if not self._victims:
            return
        waiting = {rank for rank in self._alive - self._victims if not self._notes[rank].joined}
        for rank in waiting:
            os.kill(self._ranks[rank], signal.SIGKILL)
        self._victims |= waiting

    def _is_over_time(self) -> bool:
        now = time.monotonic()
        if self._killed_at is not None:
            return now - self._killed_at > HANG_S
        return now - self._started > CALM_S

    def _end_hung(self) -> None:
        for rank in self._alive:
            # They write down where they are.
            os.kill(self._ranks[rank], signal.SIGUSR2)
        time.sleep(1.0)
        os.killpg(self._ranks[0], signal.SIGKILL)

    def _judge(self, hung: list[int]) -> Ended:
        ended, kill = time.monotonic(), self._kill
        said = {rank: _said(self._out, rank, code) for rank, code in self._codes.items()}
        note = self._notes[kill.rank] if kill is not None else None
        return Ended(
            complete=all(text == "complete" for text in said.values()),
            killed=self._killed_at is not None,
            joined=note is not None and note.joined,
            operation=note.died.decode() if note is not None else "",
            survivors={rank: text for rank, text in said.items() if rank not in self._victims},
            survivors_s=ended - self._killed_at if self._killed_at is not None else 0.0,
            hung=hung,
            left=_left_of(self._ranks[0]),
        )


def _said(out: Path, rank: int, code: int) -> str:
    """Read what a rank wrote of its end, its exit code where it could not."""
    path = out / f"rank{rank}"
    return path.read_text() if path.exists() else f"exit code {code}"


def _left_of(group: int) -> list[int]:
    """List live processes of a group, once they had time to notice that their ranks are dead."""
    deadline = time.monotonic() + LEFT_S
    while left := [process.pid for process in living() if process.group == group]:
        if time.monotonic() > deadline:
            os.killpg(group, signal.SIGKILL)
            return left
        time.sleep(POLL_S)
    return []


class _Rank:
    """A forked rank: the real `infer`, which may die at an operation on the disk."""

    def __init__(self, rank: int, size: int, note: Note, kill: Kill | None, out: Path) -> None:
        self._rank, self._size, self._note, self._kill, self._out = rank, size, note, kill, out
        self._parent, self._pid = os.getppid(), os.getpid()
        self._operations = 0

    def live(self, config: Config, run_dir: Path, port: int) -> None:
        from mgpu_ddp.distributed.signals import StopWish, die_with_parent
        from mgpu_ddp.distributed.world import join, leave
        from mgpu_ddp.infer import infer
        from mgpu_ddp.job.cache import Kept
        from mgpu_ddp.job.job import Job
        from mgpu_ddp.job.session import Session
        from mgpu_ddp.reporting import console

        self._redirect()
        place = {"RANK": self._rank, "WORLD_SIZE": self._size, "LOCAL_RANK": self._rank, "LOCAL_WORLD_SIZE": self._size}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **{k: str(v) for k, v in place.items()}}
        die_with_parent(self._parent)
        self._watch()
        try:
            world = join()
            self._note.joined = True
            console.start_logging(world)
            stop = StopWish()
            stop.install()
            kept = Kept()
            session = Session(world, stop, kept, lambda job: infer(job, world, stop, kept))
            outcome = session.run_job(Job(name="0", config=config, run_dir=run_dir))
            leave(world)
            self._end(outcome["status"] if outcome["exit_code"] == 0 else f"{outcome['status']}: {outcome['reason']}")
        except Exception as error:
            traceback.print_exc()
            self._end(f"{type(error).__name__}: {error}")

    def _redirect(self) -> None:
        log = os.open(self._out / f"rank{self._rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.register(signal.SIGUSR2, all_threads=True)

    def _watch(self) -> None:
        """Count all that makes something durable."""
        for name, target in OPERATIONS.items():
            setattr(os, name, self._counted(name, getattr(os, name), target))
        np.memmap.flush = self._counted("flush", np.memmap.flush, 0)

    def _counted(self, name: str, function: Callable[..., Any], target: int) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            # Loader workers inherit this, and what they do is no commit.
            if os.getpid() != self._pid:
                return function(*args, **options)
            self._operations += 1
            what = f"{name} {_sort(args[target])}"
            if self._dies(before=True):
                self._die(f"before {what}")
            result = function(*args, **options)
            if self._dies(before=False):
                self._die(f"after {what}")
            return result

        return call

    def _dies(self, *, before: bool) -> bool:
        kill = self._kill
        return (
            kill is not None
            and kill.rank == self._rank
            and kill.operation == self._operations
            and kill.before == before
        )

    def _die(self, operation: str) -> None:
        self._note.died = operation.encode()
        if self._kill is not None and self._kill.whom == "all ranks":
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def _end(self, text: str) -> None:
        (self._out / f"rank{self._rank}").write_text(text)
        sys.stdout.flush()
        os._exit(0 if text == "complete" else 1)


def _sort(target: Any) -> str:
    """Name the kind of thing that an operation changes, for counting."""
    if isinstance(target, np.memmap):
        return "rows"
    path = Path(os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target)
    name = path.name.removeprefix(".")
    kinds = {"part-": "part", "predictions.npy": "array", "manifest": "manifest", "status": "status"}
    found = (kind for start, kind in kinds.items() if name.startswith(start))
    return next(found, "folder" if path.is_dir() else "other")
