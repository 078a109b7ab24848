"""Random kills of jobs that are resumed with another world size until they are complete, then compared."""

import importlib
import os
import random
import shutil
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mgpu_ddp.errors import MgpuError
from soaking.attempt import CALM_S, HANG_S, Ended, Kill, attempt, outcome_sort
from soaking.disk import Journal, lose_power
from soaking.jobs import KINDS, Difference, Kind, apart, committed, compare, configure, make_images, torn_parts
from soaking.showing import Progress, print_report, print_table

ROWS = 1200
IMAGES = 900
MAX_RANKS = 4
MOST_KILLS_PER_JOB = 8
JOBS_AT_LEAST = 5
ENOUGH_FAILURES = 20
WHOM = {"one rank": 3, "rank 0": 2, "all ranks": 3, "a loader worker": 2}
"""Who is killed, how often of ten times."""
EXPECTED_ENDS = {"complete", "PeerLostError", "PeerFailedError"}
"""How survivors may end."""
OPERATIONS_AROUND, OPERATIONS_PER_WINDOW = 24, 7


@dataclass(kw_only=True, slots=True)
class Tally:
    """Everything that was counted."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By phase and victim."""
    operations: Counter[str] = field(default_factory=Counter)
    """Of kills at an operation on the disk."""
    survivors: Counter[str] = field(default_factory=Counter)
    """How ranks ended when another one was killed."""
    slowest_end_s: float = 0.0
    """The longest that survivors took to end."""
    attempts: int = 0
    jobs: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    missing: int = 0
    doubled: int = 0
    different: int = 0
    failures: list[str] = field(default_factory=list)
    """In words: tables that differ, ranks that hang, commits that vanish, resumes that are refused."""

    @property
    def killed(self) -> int:
        return sum(self.kills.values())


class Timing:
    """How long an attempt is expected to take, learnt from those before."""

    def __init__(self) -> None:
        self._start_s: dict[int, float] = {}
        self._row_s: dict[int, float] = {}

    def learn(self, size: int, ended: Ended, rows: int) -> None:
        if not ended.start_s:
            return
        self._start_s[size] = (self._start_s.get(size, ended.start_s) + ended.start_s) / 2
        working_s = ended.seconds - ended.survivors_s - ended.start_s
        if rows >= 100 and working_s > 0:
            self._row_s[size] = (self._row_s.get(size, working_s / rows) + working_s / rows) / 2

    def expect(self, size: int, rows_left: int) -> float:
        start_s = self._start_s.get(size, max(self._start_s.values(), default=1.0))
        return start_s + rows_left * self._row_s.get(size, max(self._row_s.values(), default=0.002)) + 0.3


class Soak:
    """The state of a run of `kills`."""

    def __init__(self, work: Path, count: int, seconds: float, seed: int) -> None:
        self._work, self._count, self._rng = work, count, random.Random(seed)
        self._progress = Progress("kills", count, seconds)
        self._images = work / "images"
        # A short soak is to see jobs of all kinds, too.
        self._kills_per_job = max(1, min(MOST_KILLS_PER_JOB, count // JOBS_AT_LEAST))
        self._references: dict[str, tuple[Path, int]] = {}
        self._timing = Timing()
        self.tally = Tally()

    def run(self) -> None:
        make_images(self._images, IMAGES, self._rng)
        number = 0
        while (
            self.tally.killed < self._count
            and not self._progress.out_of_time
            and len(self.tally.failures) < ENOUGH_FAILURES
        ):
            self._soak_one_job(number, KINDS[number % len(KINDS)])
            number += 1
        self._progress.end()

    @property
    def seconds(self) -> float:
        return self._progress.elapsed_s

    @property
    def out_of_time(self) -> bool:
        return self._progress.out_of_time

    def _reference(self, kind: Kind) -> tuple[Path, int]:
        """The folder of an undisturbed job with the same rows, and how many these are."""
        if kind.rows not in self._references:
            folder = self._work / f"reference-{kind.rows}"
            calm = Kind(data=kind.data, how=kind.how, collect="gather")
            config = configure(calm, self._images, ROWS, 400)
            ended = attempt(config, folder / "run", 1, None, Journal(folder), folder / "out", self._rng)
            rows = committed(folder / "run")
            if not ended.complete or rows != (ROWS if kind.data == "fake" else IMAGES):
                raise RuntimeError(f"the reference run must complete, got {rows} rows, {ended}; see {folder}")
            self._timing.learn(1, ended, rows)
            self._references[kind.rows] = (folder / "run", rows)
        return self._references[kind.rows]

    def _soak_one_job(self, number: int, kind: Kind) -> None:
        reference, total = self._reference(kind)
        folder, where = self._work / f"job-{number}", f"job {number} ({kind})"
        failures = len(self.tally.failures)
        try:
            if self._drive(kind, folder, total, where):
                self._compare(folder / "run", reference, kind, where)
        except (RuntimeError, ValueError, OSError, MgpuError) as error:
            self._fail(f"{where}: the folder must be readable, got {type(error).__name__}: {error}")
        if len(self.tally.failures) == failures:
            shutil.rmtree(folder)

    def _drive(self, kind: Kind, folder: Path, total: int, where: str) -> bool:
        """Start a job and kill it until it is complete. False where it refuses to go on."""
        run_dir, journal = folder / "run", Journal(folder / "journal")
        windows = self._rng.choice([16, 32, 48])
        config = configure(kind, self._images, ROWS, windows)
        size, kills, tries = 0, 0, 0
        while True:
            size = self._rng.choice([n for n in range(1, MAX_RANKS + 1) if n != size])
            done = committed(run_dir)
            calm = kills >= self._kills_per_job or self.tally.killed >= self._count or self._progress.out_of_time
            kill = None if calm else self._choose_kill(kind, size, total - done, windows)
            ended = attempt(config, run_dir, size, kill, journal, folder / f"attempt-{tries}", self._rng)
            here = f"{where}, attempt {tries}"
            tries += 1
            self.tally.attempts += 1
            self._judge(ended, kill, run_dir, done, f"{here}, {size} ranks, {kill}")
            self._timing.learn(size, ended, committed(run_dir) - done)
            if not ended.killed or kill is None:
                if not ended.complete:
                    self._fail(f"{here}: undisturbed, and ended as {ended.survivors}")
                return ended.complete
            kills += 1
            if kill.whom == "all ranks" and run_dir.exists():
                lose_power(run_dir, journal, self._rng)
                self._check_folder(run_dir, done, f"{here}, power lost")
            self._progress.show(self.tally.killed, f"{sum(self.tally.jobs.values())} jobs done")

    def _choose_kill(self, kind: Kind, size: int, rows_left: int, windows: int) -> Kill:
        rng = self._rng
        whom = rng.choices(list(WHOM), list(WHOM.values()))[0]
        rank = rng.randrange(size)
        if whom == "rank 0":
            rank = 0
        elif whom == "one rank" and size > 1:
            rank = rng.randrange(1, size)
        # Where rows travel to rank 0, only that one has anything to do with the disk.
        writes = kind.collect == "shards" or rank == 0 or whom == "all ranks"
        if whom != "a loader worker" and writes and rng.random() < 0.5:
            rank = rank if kind.collect == "shards" else 0
            most = OPERATIONS_AROUND + OPERATIONS_PER_WINDOW * (1 + rows_left // max(windows, 4 * size))
            chosen = Kill(whom=whom, rank=rank, operation=rng.randint(1, most), before=rng.random() < 0.5)
        else:
            after_s = rng.uniform(0, self._timing.expect(size, rows_left))
            chosen = Kill(whom=whom, rank=rank, after_s=after_s)
        return chosen

    def _judge(self, ended: Ended, kill: Kill | None, run_dir: Path, before: int, where: str) -> None:
        if ended.hung:
            self._fail(f"{where}: ranks {ended.hung} hung for {HANG_S if ended.killed else CALM_S:.0f} s")
        if ended.left:
            self._fail(f"{where}: processes {ended.left} outlived all ranks")
        if ended.killed and kill is not None:
            phase = ended.phase
            if phase == "between windows" and committed(run_dir) == before:
                phase = "before the first window"
            whom = kill.whom if kill.rank or kill.whom != "one rank" else "rank 0"
            self.tally.kills[phase, whom] += 1
            if ended.operation:
                self.tally.operations[ended.operation] += 1
            if ended.survivors:
                self.tally.slowest_end_s = max(self.tally.slowest_end_s, ended.survivors_s)
            for rank, text in ended.survivors.items():
                sort = outcome_sort(text)
                self.tally.survivors[sort] += 1
                owner = kill.whom == "a loader worker" and rank == kill.rank and sort == "StateError"
                if sort not in EXPECTED_ENDS and not owner and phase != "starting":
                    self._fail(f"{where}, while {phase}: rank {rank} ended with {text}")
        self._check_folder(run_dir, before, where)

    def _check_folder(self, run_dir: Path, before: int, where: str) -> None:
        now = committed(run_dir)
        if now < before:
            self._fail(f"{where}: {before} rows were committed, {now} are left")
        for text in torn_parts(run_dir):
            self._fail(f"{where}: {text}")

    def _compare(self, run_dir: Path, reference: Path, kind: Kind, where: str) -> None:
        found = Difference(**apart(lambda: asdict(compare(run_dir, reference))))
        tally = self.tally
        tally.jobs[str(kind)] += 1
        tally.rows += found.rows
        tally.missing += found.missing
        tally.doubled += found.doubled
        tally.different += found.different
        if not found.is_none:
            self._fail(f"{where}: {found}")

    def _fail(self, text: str) -> None:
        self.tally.failures.append(text)
        self._progress.say(f"FAILED {text}")


def _preload() -> None:
    """Import what ranks need, so that a fork has it at once."""
    for name in ("mgpu_ddp.infer", "pyarrow.parquet", "torch.fx.experimental.optimization", "torchvision"):
        importlib.import_module(name)
    threads = [(Path("/proc/self/task") / tid / "comm").read_text().strip() for tid in os.listdir("/proc/self/task")]
    if len(threads) > 1:
        print(f"note: threads of the process that forks: {threads}", file=sys.stderr)


def soak_kills(work: Path, count: int, seconds: float, seed: int) -> bool:
    """Kill `count` times, compare every table, print what was counted. True where nothing failed."""
    _preload()
    soak = Soak(work, count, seconds, seed)
    soak.run()
    tally = soak.tally
    whom = list(WHOM)
    phases = sorted({phase for phase, _ in tally.kills}, key=_order)
    rows = [(p, *(tally.kills[p, w] for w in whom), sum(tally.kills[p, w] for w in whom)) for p in phases]
    print_table(("killed while", *whom, "all"), [*rows, ("", *("" for _ in whom), tally.killed)])
    print()
    print_table(("killed at an operation", "times"), sorted(tally.operations.items()))
    print()
    print_table(("survivors ended with", "ranks"), tally.survivors.most_common())
    print()
    print_table(("jobs of kind", "complete"), sorted(tally.jobs.items()))
    print()
    print_table(
        ("attempts", "jobs", "rows", "missing", "doubled", "different", "failures"),
        [(tally.attempts, sum(tally.jobs.values()), tally.rows, tally.missing, tally.doubled, tally.different,
          len(tally.failures))],
    )  # fmt: skip
    report: dict[str, Any] = {
        "mode": "kills",
        "seed": seed,
        "asked": count,
        "kills": tally.killed,
        "out_of_time": soak.out_of_time,
        "seconds": round(soak.seconds, 1),
        "attempts": tally.attempts,
        "jobs": sum(tally.jobs.values()),
        "rows": tally.rows,
        "missing": tally.missing,
        "doubled": tally.doubled,
        "different": tally.different,
        "slowest_end_s": round(tally.slowest_end_s, 1),
        "phases": {phase: sum(tally.kills[phase, w] for w in whom) for phase in phases},
        "victims": {w: sum(tally.kills[phase, w] for phase in phases) for w in whom},
        "failures": tally.failures,
    }
    print_report(report)
    return not tally.failures


def _order(phase: str) -> int:
    from soaking.attempt import PHASES

    return PHASES.index("between windows") * 2 - 1 if phase == "before the first window" else PHASES.index(phase) * 2
