"""What only real launchers show: restarts by torchrun, orphans of a dead torchrun, nodes that go away."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soaking.jobs import CLASSES, PIXELS, committed, compare
from soaking.processes import living, ranks_below
from soaking.showing import Progress, print_report, print_table

ROWS = 6000
ENDLESS_ROWS = 1_000_000
SIDE_BY_SIDE = 3
MOST_RESTARTS = 3
PATIENCE_S = 300.0
ORPHANS_END_S = 10.0
IMPORTS_END_S = 60.0
"""How long an orphan may live that was still importing: these seconds of CPU time come first, on a busy machine."""
POLL_S = 0.02
OUTPUTS = (("parquet", "gather"), ("npy", "shards"), ("parquet", "shards"), ("npy", "gather"))


class SoakError(Exception):
    """What was to happen did not; the text says what."""


def settings(how: str, collect: str, rows: int) -> list[str]:
    """A job of small fake images on the command line."""
    return [
        f"data.size={rows}",
        f"data.image_size=[3,{PIXELS},{PIXELS}]",
        f"transform.size={PIXELS}",
        "model.name=squeezenet1_1",
        f"model.num_classes={CLASSES}",
        "batch_size=4",
        "loader.workers=1",
        "runtime.device=cpu",
        "output.commit_every=80",
        f"output.format={how}",
        f"output.collect={collect}",
        *([] if how == "npy" else ["output.fields=[topk,logits]"]),
    ]


def torchrun(options: Sequence[str], job: Sequence[str]) -> list[str]:
    """torchrun of this interpreter's environment."""
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", "mgpu_ddp.infer", *job]


@contextmanager
def started(command: list[str], folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a command in a folder of its own, its output in files there; what is left of it at the end is killed."""
    folder.mkdir(parents=True)
    foreign = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
    try:
        yield process
    finally:
        ours = {process.pid, *(rank.session for rank in ranks_below(process.pid).values())}
        for left in living():
            if left.session in ours:
                with suppress(ProcessLookupError):
                    os.kill(left.pid, signal.SIGKILL)
        process.wait()


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[bytes]", what: str) -> bool:
    """Wait for a condition. False when the process ended first.

    Raises:
        SoakError: it takes too long.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise SoakError(f"{what} must come within {PATIENCE_S:.0f} s, it did not")
        time.sleep(POLL_S)
    return True


def _wait_for_end(process: "subprocess.Popen[bytes]", folder: Path) -> None:
    try:
        code = process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        raise SoakError(f"the launcher must end within {PATIENCE_S:.0f} s, it did not") from None
    if code != 0:
        raise SoakError(f"the job must complete without help, torchrun left with {code}; see {folder / 'stderr'}")


@dataclass(kw_only=True, slots=True)
class Tally:
    """Everything that was counted."""

    done: Counter[str] = field(default_factory=Counter)
    launches: int = 0
    rows: int = 0
    missing: int = 0
    doubled: int = 0
    different: int = 0
    slowest_s: dict[str, float] = field(default_factory=dict)
    """The longest that what follows took, where that is bounded."""
    failures: list[str] = field(default_factory=list)


class Soak:
    """A run of one of these modes."""

    def __init__(self, mode: str, work: Path, count: int, seconds: float, seed: int) -> None:
        self.mode, self.work, self.count, self.seed = mode, work, count, seed
        self.rng = random.Random(seed)
        self.progress = Progress(mode, count, seconds)
        self.tally = Tally()
        self._lock = threading.Lock()

    def references(self) -> dict[str, Path]:
        """Undisturbed runs of one process, by format."""
        folders = {}
        for how in ("parquet", "npy"):
            folder = self.work / f"reference-{how}"
            command = [sys.executable, "-m", "mgpu_ddp.infer", *settings(how, "gather", ROWS), "output.dir=run"]
            with started(command, folder) as process:
                _wait_for_end(process, folder)
            folders[how] = folder / "run"
        return folders

    def each(self, runs: Sequence[Callable[[], None]], side_by_side: int) -> None:
        """Call all, some at a time, until the time is over; note what they raise."""

        def one(run: Callable[[], None]) -> None:
            if self.progress.out_of_time:
                return
            try:
                run()
            except SoakError as error:
                self.fail(str(error))

        with ThreadPoolExecutor(side_by_side) as pool:
            list(pool.map(one, runs))

    def count_one(self, what: str) -> None:
        with self._lock:
            self.tally.done[what] += 1
            self.progress.show(sum(self.tally.done.values()), f"{self.tally.launches} launches")

    def slowest(self, what: str, seconds: float) -> None:
        with self._lock:
            self.tally.slowest_s[what] = max(self.tally.slowest_s.get(what, 0.0), round(seconds, 1))

    def compare(self, run_dir: Path, reference: Path, where: str) -> None:
        with self._lock:
            found = compare(run_dir, reference)
            self.tally.rows += found.rows
            self.tally.missing += found.missing
            self.tally.doubled += found.doubled
            self.tally.different += found.different
        if not found.is_none:
            self.fail(f"{where}: {found}")

    def fail(self, text: str) -> None:
        with self._lock:
            self.tally.failures.append(text)
        self.progress.say(f"FAILED {text}")

    def report(self, what: str) -> bool:
        self.progress.end()
        tally, done = self.tally, sum(self.tally.done.values())
        slowest = tally.slowest_s
        rows = [
            (name, times, *([slowest.get(name, "")] if slowest else [])) for name, times in sorted(tally.done.items())
        ]
        print_table(
            (what, "times", *(["gone after s"] if slowest else [])), [*rows, ("", done, *([""] if slowest else []))]
        )
        print()
        head = ("launches", "rows", "missing", "doubled", "different", "failures")
        figures = (tally.launches, tally.rows, tally.missing, tally.doubled, tally.different)
        print_table(head, [(*figures, len(tally.failures))])
        report: dict[str, Any] = {
            "mode": self.mode,
            "seed": self.seed,
            "asked": self.count,
            "done": done,
            "out_of_time": self.progress.out_of_time,
            "seconds": round(self.progress.elapsed_s, 1),
            **dict(zip(head[:-1], figures, strict=True)),
            "by": dict(tally.done),
            "slowest_s": slowest,
            "failures": tally.failures,
        }
        print_report(report)
        return not tally.failures


def soak_restarts(work: Path, count: int, seconds: float, seed: int) -> bool:
    """Kill ranks under a torchrun that restarts them, some times per job."""
    soak = Soak("restarts", work, count, seconds, seed)
    references = soak.references()

    def restart(number: int, kills: int, rng: random.Random) -> None:
        how, collect = OUTPUTS[number % len(OUTPUTS)]
        folder = work / f"job-{number}"
        where = f"job {number} ({how} {collect})"
        options = ["--standalone", "--local-addr=127.0.0.1", "--nproc_per_node=2", f"--max-restarts={MOST_RESTARTS}"]
        soak.tally.launches += 1

        def run_dir() -> Path:
            return next(iter(sorted(folder.glob("outputs/*/*"))), folder / "none")

        with started(torchrun(options, settings(how, collect, ROWS)), folder) as launcher:
            before: set[int] = set()
            for kill in range(kills):
                at = rng.randint(ROWS * kill // kills, int(ROWS * (kill + 0.8) / kills)) or 1
                rank = rng.randrange(2)

                def there(at: int = at, rank: int = rank, before: set[int] = before) -> bool:
                    ranks = ranks_below(launcher.pid) if committed(run_dir()) >= at else {}
                    return rank in ranks and ranks[rank].pid not in before

                if not wait_until(there, launcher, f"{where}: {at} committed rows"):
                    soak.progress.say(f"note: {where} ended before its kill at {at} rows")
                    break
                ranks = ranks_below(launcher.pid)
                before |= {process.pid for process in ranks.values()}
                if rank in ranks:
                    os.kill(ranks[rank].pid, signal.SIGKILL)
                    soak.count_one(f"rank {rank} of 2, {how} {collect}")
            _wait_for_end(launcher, folder)
        folders = list(folder.glob("outputs/*/*"))
        if len(folders) != 1:
            raise SoakError(f"{where}: all restarts must use one run folder, got {folders}")
        soak.compare(folders[0], references[how], where)
        shutil.rmtree(folder)

    per_job = [min(MOST_RESTARTS, count - first) for first in range(0, count, MOST_RESTARTS)]
    seeds = [soak.rng.getrandbits(32) for _ in per_job]
    soak.each(
        [lambda n=n, k=k: restart(n, k, random.Random(seeds[n])) for n, k in enumerate(per_job)],  # type: ignore[misc]
        SIDE_BY_SIDE - 1,
    )
    return soak.report("killed and restarted")


def soak_orphans(work: Path, count: int, seconds: float, seed: int) -> bool:
    """Kill torchrun itself at some stage of a job, and see that nothing outlives it."""
    soak = Soak("orphans", work, count, seconds, seed)

    def orphan(number: int, rng: random.Random) -> None:
        folder = work / f"job-{number}"
        stage = rng.choice(["starting", "claiming", "committing", "committing"])
        at = rng.uniform(0, 5) if stage == "starting" else rng.randint(1, 2000)
        command = torchrun(
            ["--standalone", "--local-addr=127.0.0.1", "--nproc_per_node=2"],
            [*settings("parquet", rng.choice(["gather", "shards"]), ENDLESS_ROWS), "output.dir=run"],
        )
        soak.tally.launches += 1
        with started(command, folder) as launcher:

            def there() -> bool:
                if stage == "starting":
                    # Its CPU time says how far a process is with its imports, whatever else the machine does.
                    ranks = ranks_below(launcher.pid)
                    return len(ranks) == 2 and min(process.cpu_s for process in ranks.values()) >= at
                if stage == "claiming":
                    return (folder / "run").exists()
                return committed(folder / "run") >= at

            if not wait_until(there, launcher, f"stage {stage} of {folder}"):
                raise SoakError(f"{folder}: torchrun ended before it was killed")
            sessions = {process.session for process in ranks_below(launcher.pid).values()}
            launcher.kill()
            launcher.wait()
            soak.count_one(stage)
            since = time.monotonic()
            within_s = IMPORTS_END_S if stage == "starting" else ORPHANS_END_S
            while left := [process for process in living() if process.session in sessions]:
                if time.monotonic() - since > within_s:
                    for process in left:
                        with suppress(ProcessLookupError):
                            os.kill(process.pid, signal.SIGKILL)
                    raise SoakError(
                        f"{folder}: {len(left)} workers outlived torchrun, killed while {stage} ({at}), for"
                        f" {within_s:.0f} s"
                    )
                time.sleep(POLL_S)
            soak.slowest(stage, time.monotonic() - since)
        shutil.rmtree(folder)

    seeds = [soak.rng.getrandbits(32) for _ in range(count)]
    soak.each(
        [lambda n=n: orphan(n, random.Random(seeds[n])) for n in range(count)],  # type: ignore[misc]
        SIDE_BY_SIDE,
    )
    return soak.report("torchrun killed while")


def soak_elastic(work: Path, count: int, seconds: float, seed: int) -> bool:
    """Kill one of two nodes of an elastic torchrun, the one that does not host the rendezvous."""
    soak = Soak("elastic", work, count, seconds, seed)
    references = soak.references()

    def shrink(number: int, rng: random.Random) -> None:
        how, collect = OUTPUTS[number % len(OUTPUTS)]
        folder = work / f"job-{number}"
        run_dir, where = folder / "run", f"job {number} ({how} {collect})"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = [
            "--nnodes=1:2",
            "--nproc_per_node=1",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint=127.0.0.1:{port}",
            f"--rdzv-id=soak{number}",
            "--local-addr=127.0.0.1",
            f"--max-restarts={MOST_RESTARTS}",
        ]
        command = torchrun(options, [*settings(how, collect, ROWS), f"output.dir={run_dir}"])
        soak.tally.launches += 1
        at = rng.randint(1, ROWS // 2)
        with started(command, folder / "first") as first:
            wait_until(lambda: _listens(port), first, f"{where}: the rendezvous")
            with started(command, folder / "second") as second:

                def there() -> bool:
                    if committed(run_dir) < at:
                        return False
                    return bool(ranks_below(first.pid) and ranks_below(second.pid))

                if not wait_until(there, first, f"{where}: {at} rows by two nodes"):
                    raise SoakError(f"{where}: the first node ended alone; see {folder}")
                sizes = _world_sizes(run_dir)
                ours = {second.pid, *(process.session for process in ranks_below(second.pid).values())}
                for process in living():
                    if process.session in ours:
                        with suppress(ProcessLookupError):
                            os.kill(process.pid, signal.SIGKILL)
                second.wait()
                soak.count_one(f"{how} {collect}")
            _wait_for_end(first, folder / "first")
        if sizes != [2] or _world_sizes(run_dir) != [2, 1]:
            raise SoakError(f"{where}: the world must shrink from 2 to 1, got {sizes}, then {_world_sizes(run_dir)}")
        soak.compare(run_dir, references[how], where)
        shutil.rmtree(folder)

    seeds = [soak.rng.getrandbits(32) for _ in range(count)]
    soak.each(
        [lambda n=n: shrink(n, random.Random(seeds[n])) for n in range(count)],  # type: ignore[misc]
        SIDE_BY_SIDE - 1,
    )
    return soak.report("second node killed")


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _world_sizes(run_dir: Path) -> list[int]:
    from mgpu_ddp.output.manifest import Manifest

    manifest = Manifest.read(run_dir)
    return manifest.world_sizes if manifest is not None else []
