"""One attempt at a job: ranks forked from this preloaded process, one of which, or all, are killed on the way.

The ranks are real processes in a world of real gloo over loopback. What a launcher would do for them is done here
only as far as it must be: ranks that have not joined yet when another one dies are killed, because they would wait
for it until the store's own timeout. Those that have joined have to end by themselves.
"""

import faulthandler
import mmap
import os
import random
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mgpu_ddp.config.schema import Config
from soaking.disk import Death, Journal, WatchedDisk
from soaking.jobs import LOST_AFTER_S
from soaking.processes import children, living

HANG_S = LOST_AFTER_S + 26.0
"""How long after a kill the survivors may take to end: far more than they need, on a machine that others use too."""
CALM_S = 120.0
"""How long an attempt may take in which nothing is killed."""
POLL_S = 0.005

PHASES = (
    "starting",
    "claiming",
    "between windows",
    "gathering",
    "writing a part",
    "listing parts",
    "proving",
    "leaving",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kill:
    """Who is to die, and when: after some seconds, or before or after so many operations on the disk."""

    whom: str
    """one rank, rank 0, all ranks, or a loader worker."""
    rank: int
    after_s: float | None = None
    operation: int | None = None
    before: bool = False


class Notes:
    """What ranks leave for this process to read once they are dead: memory that all share."""

    SLOT_BYTES = 64
    FIELDS: ClassVar = {
        "main": (0, "B"),
        "inner": (1, "B"),
        "joined": (2, "B"),
        "windows_at": (8, "d"),
        "died": (16, "48s"),
    }

    def __init__(self, size: int) -> None:
        self._memory = mmap.mmap(-1, size * self.SLOT_BYTES)

    def get(self, rank: int, name: str) -> Any:
        offset, form = self.FIELDS[name]
        return struct.unpack_from(form, self._memory, rank * self.SLOT_BYTES + offset)[0]

    def put(self, rank: int, name: str, value: Any) -> None:
        offset, form = self.FIELDS[name]
        struct.pack_into(form, self._memory, rank * self.SLOT_BYTES + offset, value)

    def phase(self, rank: int) -> str:
        """Where a rank is: its collecting thread tells more than its main one, while it has something to do."""
        return PHASES[self.get(rank, "inner") or self.get(rank, "main")]


@dataclass(kw_only=True, slots=True)
class Ended:
    """How an attempt ended."""

    complete: bool
    """Whether every rank said so and left by itself."""
    killed: bool
    """Whether the kill came before the end."""
    phase: str
    """In which the killed rank was."""
    operation: str
    seconds: float
    start_s: float
    """From the start to the first window, 0 where there was none."""
    survivors: dict[int, str] = field(default_factory=dict)
    """How the ranks that nobody killed ended."""
    survivors_s: float = 0.0
    """How long after the kill the last of them was there."""
    hung: list[int] = field(default_factory=list)
    left: list[int] = field(default_factory=list)
    """Processes that outlived all ranks."""


def attempt(
    config: Config, run_dir: Path, size: int, kill: Kill | None, journal: Journal, out: Path, rng: random.Random
) -> Ended:
    """Run a job with `size` ranks until all have ended, and kill what is to be killed."""
    out.mkdir(parents=True)
    notes, port = Notes(size), _free_port()
    started = time.monotonic()
    ranks: list[int] = []
    sys.stdout.flush()
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            try:
                os.setpgid(0, ranks[0] if ranks else 0)
                _Rank(rank, size, notes, kill, journal, out).live(config, run_dir, port)
            finally:
                os._exit(70)
        os.setpgid(pid, ranks[0] if ranks else pid)
        ranks.append(pid)
    return _Watch(ranks, notes, kill, started, out, rng).until_the_end()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class _Watch:
    """What the parent of the ranks sees and does."""

    def __init__(
        self, ranks: list[int], notes: Notes, kill: Kill | None, started: float, out: Path, rng: random.Random
    ) -> None:
        self._ranks, self._notes, self._kill = ranks, notes, kill
        self._started, self._out, self._rng = started, out, rng
        self._alive = set(range(len(ranks)))
        self._codes: dict[int, int] = {}
        self._killed_at: float | None = None
        self._victims: set[int] = set()
        self._phase, self._before_joining = "", False

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
        ended = time.monotonic()
        return self._judge(ended, hung)

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
        kill = self._kill
        late = kill is not None and kill.after_s is not None and time.monotonic() - self._started >= kill.after_s
        if kill is None or not late or self._killed_at is not None or kill.rank not in self._alive:
            return
        if kill.whom == "a loader worker":
            workers = children(self._ranks[kill.rank])
            if workers:
                self._phase = self._notes.phase(kill.rank)
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
        if self._kill is None or self._kill.whom == "a loader worker":
            return
        waiting = {rank for rank in self._alive - self._victims if not self._notes.get(rank, "joined")}
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
            os.kill(self._ranks[rank], signal.SIGUSR2)
        time.sleep(1.0)
        os.killpg(self._ranks[0], signal.SIGKILL)

    def _judge(self, ended: float, hung: list[int]) -> Ended:
        kill = self._kill
        said = {rank: _said(self._out, rank, code) for rank, code in self._codes.items()}
        windows_at = [at for rank in self._codes if (at := self._notes.get(rank, "windows_at"))]
        return Ended(
            complete=all(text == "complete" for text in said.values()),
            killed=self._killed_at is not None,
            phase=self._phase or (self._notes.phase(kill.rank) if kill else ""),
            operation=self._notes.get(kill.rank, "died").rstrip(b"\0").decode() if kill else "",
            seconds=ended - self._started,
            start_s=max(windows_at) - self._started if len(windows_at) == len(self._ranks) else 0.0,
            survivors={rank: text for rank, text in said.items() if rank not in self._victims},
            survivors_s=ended - self._killed_at if self._killed_at is not None else 0.0,
            hung=hung,
            left=_left_of(self._ranks[0]),
        )


def _said(out: Path, rank: int, code: int) -> str:
    """What a rank wrote of its end, its exit code where it could not."""
    path = out / f"rank{rank}"
    return path.read_text() if path.exists() else f"exit code {code}"


def _left_of(group: int) -> list[int]:
    """Live processes of a group, once they had some seconds to notice that their ranks are dead."""
    deadline = time.monotonic() + 5
    while left := [process.pid for process in living() if process.group == group]:
        if time.monotonic() > deadline:
            os.killpg(group, signal.SIGKILL)
            return left
        time.sleep(POLL_S)
    return []


class _Rank:
    """What runs in a forked rank: the real `infer`, with marks where it is."""

    def __init__(self, rank: int, size: int, notes: Notes, kill: Kill | None, journal: Journal, out: Path) -> None:
        self._rank, self._size, self._notes, self._out = rank, size, notes, out
        death = None
        if kill is not None and kill.operation is not None and kill.rank == rank:
            death = Death(number=kill.operation, before=kill.before, act=self._die)
        self._all = kill is not None and kill.whom == "all ranks"
        self._parent = os.getppid()
        self._disk = WatchedDisk(journal, death)

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
        self._disk.install()
        self._mark_phases()
        try:
            world = join()
            self._notes.put(self._rank, "joined", 1)
            self._enter("claiming")
            console.start_logging(world)
            stop = StopWish()
            stop.install()
            kept = Kept()
            session = Session(world, stop, kept, lambda job: infer(job, world, stop, kept))
            outcome = session.run_job(Job(name="0", config=config, run_dir=run_dir))
            self._enter("leaving")
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

    def _mark_phases(self) -> None:
        from mgpu_ddp import infer
        from mgpu_ddp.distributed.channel import Channel
        from mgpu_ddp.job.collector import Collector
        from mgpu_ddp.output.parts import ArrayWriter, Table, TableWriter

        for owner, name, phase in (
            (Channel, "gather", "gathering"),
            (TableWriter, "write", "writing a part"),
            (ArrayWriter, "write", "writing a part"),
            (Table, "list", "listing parts"),
        ):
            setattr(owner, name, self._during(phase, getattr(owner, name)))
        Collector.__enter__ = self._entering("between windows", Collector.__enter__)  # type: ignore[method-assign]
        infer.finish_job = self._entering("proving", infer.finish_job)

    def _during(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def marked(*args: Any, **options: Any) -> Any:
            before = self._notes.get(self._rank, "inner")
            self._notes.put(self._rank, "inner", PHASES.index(phase))
            try:
                return function(*args, **options)
            finally:
                self._notes.put(self._rank, "inner", before)

        return marked

    def _entering(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def marked(*args: Any, **options: Any) -> Any:
            self._enter(phase)
            return function(*args, **options)

        return marked

    def _enter(self, phase: str) -> None:
        self._notes.put(self._rank, "main", PHASES.index(phase))
        if phase == "between windows":
            self._notes.put(self._rank, "windows_at", time.monotonic())

    def _die(self, operation: str) -> None:
        self._notes.put(self._rank, "died", operation.encode())
        if self._all:
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def _end(self, text: str) -> None:
        (self._out / f"rank{self._rank}").write_text(text)
        sys.stdout.flush()
        os._exit(0 if text == "complete" else 1)


def outcome_sort(text: str) -> str:
    """The gist of how a rank ended, for counting."""
    return text.partition(":")[0]
