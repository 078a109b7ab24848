"""Faults that only real launchers show: restarts by torchrun, orphans of a dead torchrun, nodes that go away."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.processes import kill_sessions, living, ranks_below, sessions_of, started, torchrun
from common.showing import Progress

from mgpu_ddp.output.manifest import Manifest
from soaking.jobs import Kind, compare, settings
from soaking.tally import Soak, Tally
from tests.support.starting import committed_rows

ROWS = 6000
ENDLESS_ROWS = 1_000_000
COMMIT_EVERY = 80
SIDE_BY_SIDE = 2
MOST_RESTARTS = 3
LIMIT_S = 300.0
ORPHANS_END_S = 10.0
IMPORTS_END_S = 60.0
"""How long an orphan may live that was still importing: these seconds of CPU time come first, on a busy machine."""
POLL_S = 0.02
KINDS = [
    Kind(data="fake", how=how, collect=collect)
    for how, collect in (("parquet", "gather"), ("npy", "shards"), ("parquet", "shards"), ("npy", "gather"))
]
ONE_NODE = ("--standalone", "--local-addr=127.0.0.1", "--nproc_per_node=2")
Launcher = subprocess.Popen[bytes]


class SoakError(Exception):
    """An awaited event did not happen; the text names it."""


class Launches:
    """Shared by the modes: jobs side by side, and undisturbed runs to compare them with."""

    def __init__(self, soak: Soak) -> None:
        self.work = soak.work
        self.tally = Tally(soak=soak, progress=Progress(soak.mode, soak.count, soak.seconds))
        self._rng = random.Random(soak.seed)
        # Reading tables takes memory.
        self._one_at_a_time = threading.Lock()
        self._references: dict[str, Path] = {}

    def each(self, count: int, run: Callable[[int, random.Random], None]) -> None:
        """Run jobs 0 to `count`, some at a time, until the time is over; note what they raise."""
        seeds = [self._rng.getrandbits(32) for _ in range(count)]

        def one(number: int) -> None:
            if self.tally.progress.out_of_time:
                return
            self.tally.begin()
            try:
                run(number, random.Random(seeds[number]))
            except SoakError as error:
                self.tally.fail(str(error))

        with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            list(pool.map(one, range(count)))

    def compare(self, run_dir: Path, kind: Kind, where: str) -> None:
        """Compare a table with that of an undisturbed run of one process."""
        with self._one_at_a_time:
            if kind.rows not in self._references:
                folder = self.work / f"reference-{kind.rows}"
                with started([sys.executable, *job_of(kind), "output.dir=run"], folder) as process:
                    wait_for_end(process, folder)
                self._references[kind.rows] = folder / "run"
            found = compare(run_dir, self._references[kind.rows])
        self.tally.compared(found, where)


def job_of(kind: Kind, rows: int = ROWS) -> list[str]:
    """Name the module and the settings of a job of small fake images."""
    return ["-m", "mgpu_ddp.infer", *settings(kind, Path(), rows, COMMIT_EVERY)]


def wait_until(condition: Callable[[], bool], process: Launcher, what: str) -> bool:
    """Wait for a condition. False when the process ended first.

    Raises:
        SoakError: it takes too long.
    """
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise SoakError(f"{what} did not come within {LIMIT_S:.0f} s")
        time.sleep(POLL_S)
    return True


def wait_for_end(process: Launcher, folder: Path) -> None:
    """Wait until a job has completed by itself.

    Raises:
        SoakError: it did not.
    """
    try:
        code = process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        raise SoakError(f"the job did not end within {LIMIT_S:.0f} s; see {folder}") from None
    if code != 0:
        raise SoakError(f"the job did not complete by itself, exit code {code}; see {folder / 'stderr'}")


def soak_restarts(soak: Soak) -> bool:
    """Kill ranks under a torchrun that restarts them, some times per job."""
    launches = Launches(soak)
    tally = launches.tally

    def restart(number: int, rng: random.Random) -> None:
        kind = KINDS[number % len(KINDS)]
        folder, where = launches.work / f"job-{number}", f"job {number} ({kind})"
        kills = min(MOST_RESTARTS, soak.count - number * MOST_RESTARTS)
        command = [*torchrun(*ONE_NODE, f"--max-restarts={MOST_RESTARTS}"), *job_of(kind)]

        def run_dir() -> Path:
            return next(iter(folder.glob("outputs/*/*")), folder / "none")

        with started(command, folder) as launcher:
            before: set[int] = set()
            for kill in range(kills):
                at = rng.randint(ROWS * kill // kills, int(ROWS * (kill + 0.8) / kills)) or 1
                victim = rng.randrange(2)
                if not wait_until(lambda at=at: committed_rows(run_dir()) >= at, launcher, f"{where}: {at} rows"):  # type: ignore[misc]
                    raise SoakError(f"{where}: it ended before its kill at {at} rows; see {folder}")
                ranks = ranks_below(launcher.pid)
                while victim not in ranks or ranks[victim].pid in before:
                    # Those of the last attempt are still being ended.
                    if launcher.poll() is not None:
                        raise SoakError(f"{where}: torchrun did not start the ranks again; see {folder}")
                    time.sleep(POLL_S)
                    ranks = ranks_below(launcher.pid)
                before |= {process.pid for process in ranks.values()}
                os.kill(ranks[victim].pid, signal.SIGKILL)
                tally.kill(f"rank {victim} of 2", str(kind))
            wait_for_end(launcher, folder)
        folders = list(folder.glob("outputs/*/*"))
        if len(folders) != 1:
            raise SoakError(f"{where}: the restarts did not share one run folder: {folders}")
        launches.compare(folders[0], kind, where)
        shutil.rmtree(folder)

    launches.each(-(-soak.count // MOST_RESTARTS), restart)
    return tally.report("killed and restarted", "kind")


def soak_orphans(soak: Soak) -> bool:
    """Kill torchrun itself at some stage of a job, and see that nothing outlives it."""
    launches = Launches(soak)
    tally = launches.tally

    def orphan(number: int, rng: random.Random) -> None:
        folder = launches.work / f"job-{number}"
        stage = rng.choice(["starting", "claiming", "committing", "committing"])
        at = rng.uniform(0, 5) if stage == "starting" else rng.randint(1, 2000)
        job = [*job_of(rng.choice(KINDS), ENDLESS_ROWS), "output.dir=run"]
        with started([*torchrun(*ONE_NODE), *job], folder) as launcher:

            def there() -> bool:
                if stage == "starting":
                    # Its CPU time says how far a process is with its imports, whatever else the machine does.
                    ranks = ranks_below(launcher.pid)
                    return len(ranks) == 2 and min(process.cpu_s for process in ranks.values()) >= at
                if stage == "claiming":
                    return (folder / "run").exists()
                return committed_rows(folder / "run") >= at

            if not wait_until(there, launcher, f"stage {stage} of {folder}"):
                raise SoakError(f"{folder}: torchrun ended before it was killed")
            sessions = sessions_of(launcher.pid) - {launcher.pid}
            launcher.kill()
            launcher.wait()
            tally.kill(stage)
            since = time.monotonic()
            within_s = IMPORTS_END_S if stage == "starting" else ORPHANS_END_S
            while left := [process for process in living() if process.session in sessions]:
                if time.monotonic() - since > within_s:
                    kill_sessions(sessions)
                    raise SoakError(
                        f"{folder}: {len(left)} workers outlived torchrun, killed while {stage} ({at}), for"
                        f" {within_s:.0f} s"
                    )
                time.sleep(POLL_S)
            tally.took(f"end of the orphans, {stage}", time.monotonic() - since)
        shutil.rmtree(folder)

    launches.each(soak.count, orphan)
    return tally.report("torchrun killed while")


def soak_elastic(soak: Soak) -> bool:
    """Kill one of two nodes of an elastic torchrun, the one that does not host the rendezvous."""
    launches = Launches(soak)
    tally = launches.tally

    def shrink(number: int, rng: random.Random) -> None:
        kind = KINDS[number % len(KINDS)]
        folder, where = launches.work / f"job-{number}", f"job {number} ({kind})"
        run_dir, at = folder / "run", rng.randint(1, ROWS // 2)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        rendezvous = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-id=soak{number}")
        node = ("--nnodes=1:2", "--nproc_per_node=1", "--local-addr=127.0.0.1", f"--max-restarts={MOST_RESTARTS}")
        command = [*torchrun(*rendezvous, *node), *job_of(kind), f"output.dir={run_dir}"]
        with started(command, folder / "first") as first:
            wait_until(lambda: _listens(port), first, f"{where}: the rendezvous")
            with started(command, folder / "second") as second:

                def there() -> bool:
                    return committed_rows(run_dir) >= at and bool(ranks_below(first.pid) and ranks_below(second.pid))

                if not wait_until(there, first, f"{where}: {at} rows by two nodes"):
                    raise SoakError(f"{where}: the first node ended alone; see {folder}")
                sizes = _world_sizes(run_dir)
            tally.kill(str(kind))
            wait_for_end(first, folder / "first")
        if (sizes, _world_sizes(run_dir)) != ([2], [2, 1]):
            raise SoakError(f"{where}: the world did not shrink from 2 to 1: {sizes}, then {_world_sizes(run_dir)}")
        launches.compare(run_dir, kind, where)
        shutil.rmtree(folder)

    launches.each(soak.count, shrink)
    return tally.report("second node killed")


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _world_sizes(run_dir: Path) -> list[int]:
    manifest = Manifest.read(run_dir)
    return manifest.world_sizes if manifest is not None else []
