"""Random kills of jobs that are resumed with another world size until they are complete, then compared."""

import random
import shutil
from pathlib import Path

from common.showing import Progress

from mgpu_ddp.errors import MgpuError
from soaking.attempt import CALM_S, HANG_S, Attempt, Ended, Kill
from soaking.jobs import KINDS, Kind, compare, make_images, settings, torn_parts
from soaking.tally import Soak, Tally
from tests.support.starting import committed_rows

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
STARTS_WITHIN_S = 2.0
"""How long after the start a kill may come that is not to wait for rows."""


def soak_kills(soak: Soak) -> bool:
    """Kill so many times, compare every table, print what was counted. True where nothing failed."""
    rng = random.Random(soak.seed)
    tally = Tally(soak=soak, progress=Progress("kills", soak.count, soak.seconds))
    images = soak.work / "images"
    make_images(images, IMAGES, rng)
    # A short soak is to see jobs of all kinds, too.
    per_job = max(1, min(MOST_KILLS_PER_JOB, soak.count // JOBS_AT_LEAST))
    references: dict[str, Path] = {}
    number = 0
    while tally.killed < soak.count and not tally.progress.out_of_time and len(tally.failures) < ENOUGH_FAILURES:
        kind = KINDS[number % len(KINDS)]
        if kind.rows not in references:
            references[kind.rows] = _reference(kind, images, soak.work, rng)
        job = _Job(number, kind, images, references[kind.rows], tally, rng)
        job.soak(min(per_job, soak.count - tally.killed))
        number += 1
    return tally.report("killed", "when")


def _reference(kind: Kind, images: Path, work: Path, rng: random.Random) -> Path:
    """Run a job undisturbed: the folder whose rows all of its kind must have."""
    folder = work / f"reference-{kind.rows}"
    calm = Kind(data=kind.data, how=kind.how, collect="gather")
    job = [*settings(calm, images, ROWS, 400), f"output.dir={folder / 'run'}"]
    ended = Attempt(job, folder / "run", 1, None, folder / "out", rng).until_the_end()
    rows = committed_rows(folder / "run")
    if not ended.complete or rows != _total(kind):
        raise RuntimeError(f"the reference run did not complete: {rows} rows, {ended}; see {folder}")
    return folder / "run"


def _total(kind: Kind) -> int:
    return ROWS if kind.data == "fake" else IMAGES


class _Job:
    """A job that is killed and resumed until it is complete."""

    def __init__(
        self, number: int, kind: Kind, images: Path, reference: Path, tally: Tally, rng: random.Random
    ) -> None:
        self._kind, self._reference, self._tally, self._rng = kind, reference, tally, rng
        self._folder = tally.soak.work / f"job-{number}"
        self._run_dir, self._name = self._folder / "run", f"job {number} ({kind})"
        self._commit_every = rng.choice([16, 32, 48])
        self._settings = [*settings(kind, images, ROWS, self._commit_every), f"output.dir={self._run_dir}"]

    def soak(self, most_kills: int) -> None:
        """Kill it so many times at most, and compare what it leaves."""
        failures = len(self._tally.failures)
        try:
            if self._drive(most_kills):
                self._tally.compared(compare(self._run_dir, self._reference), self._name)
        except (RuntimeError, ValueError, OSError, MgpuError) as error:
            self._tally.fail(f"{self._name}: the folder cannot be read: {type(error).__name__}: {error}")
        if len(self._tally.failures) == failures:
            shutil.rmtree(self._folder)

    def _drive(self, most_kills: int) -> bool:
        """Start the job and kill it until it is complete. False where it refuses to go on."""
        size = kills = tries = 0
        while True:
            size = self._rng.choice([n for n in range(1, MAX_RANKS + 1) if n != size])
            done = committed_rows(self._run_dir)
            calm = kills >= most_kills or self._tally.progress.out_of_time
            kill = None if calm else self._choose_kill(size, done)
            self._tally.begin()
            out = self._folder / f"attempt-{tries}"
            ended = Attempt(self._settings, self._run_dir, size, kill, out, self._rng).until_the_end()
            where = f"{self._name}, attempt {tries}, {size} ranks, {kill}"
            self._judge(ended, kill, done, where)
            if not ended.killed:
                if not ended.complete:
                    self._tally.fail(f"{where}: nobody was killed, and it ended as {ended.survivors}")
                return ended.complete
            kills += 1
            tries += 1

    def _choose_kill(self, size: int, done: int) -> Kill:
        rng, total = self._rng, _total(self._kind)
        whom = rng.choices(list(WHOM), list(WHOM.values()))[0]
        rank = rng.randrange(size)
        if whom == "rank 0":
            rank = 0
        elif whom == "one rank" and size > 1:
            rank = rng.randrange(1, size)
        in_shards = self._kind.collect == "shards"
        # Where rows travel to rank 0, only that one has anything to do with the disk.
        writes = in_shards or rank == 0 or whom == "all ranks"
        if whom != "a loader worker" and writes and rng.random() < 0.5:
            windows = 1 + (total - done) // max(self._commit_every, 4 * size)
            return Kill(
                whom=whom,
                rank=rank if in_shards else 0,
                operation=rng.randint(1, OPERATIONS_AROUND + OPERATIONS_PER_WINDOW * windows),
                before=rng.random() < 0.5,
            )
        if rng.random() < 0.3:
            return Kill(whom=whom, rank=rank, seconds=rng.uniform(0, STARTS_WITHIN_S))
        # Some of them once all rows are there, while the table is proved.
        rows = min(total, done + int(1.2 * rng.random() * (total - done)))
        return Kill(whom=whom, rank=rank, rows=rows, seconds=rng.uniform(0, 0.2))

    def _judge(self, ended: Ended, kill: Kill | None, before: int, where: str) -> None:
        fail, now = self._tally.fail, committed_rows(self._run_dir)
        if ended.hung:
            fail(f"{where}: ranks {ended.hung} hung for {HANG_S if ended.killed else CALM_S:.0f} s")
        if ended.left:
            fail(f"{where}: processes {ended.left} outlived all ranks")
        if now < before:
            fail(f"{where}: {before} rows were committed, {now} are left")
        for text in torn_parts(self._run_dir):
            fail(f"{where}: {text}")
        if not ended.killed or kill is None:
            return
        self._tally.kill(kill.whom, self._when(ended, before, now))
        if ended.survivors:
            self._tally.took("end of the survivors", ended.survivors_s)
        for rank, error in ended.survivors.items():
            # The rank whose worker was killed says so.
            owner = kill.whom == "a loader worker" and rank == kill.rank and error == "StateError"
            if error not in EXPECTED_ENDS and not owner and ended.joined:
                fail(f"{where}: rank {rank} ended with {error}")

    def _when(self, ended: Ended, before: int, now: int) -> str:
        """Name the moment of a kill, for counting."""
        if ended.operation:
            return ended.operation
        if not ended.joined:
            return "starting"
        if now == before:
            return "before its first window"
        return "after all rows" if now == _total(self._kind) else "between windows"
