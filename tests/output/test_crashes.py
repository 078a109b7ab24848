"""The next attempt makes good what a crash, a power cut, a late writer or a truncated file leaves.

With MGPU_DDP_EVERY_STEP set, every step that a job takes on disk is one at which it is killed once, and every write is
torn once; else one in a few. CSV and JSON Lines differ from Parquet in the bytes of a part alone: one scenario each, in
which parts are read back.
"""

import functools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mgpu_ddp.data.listing import FILE_NAME, Listing, no_names
from mgpu_ddp.errors import ProofError, UsageError, WriteError
from mgpu_ddp.output.atomic_files import create_file
from mgpu_ddp.output.formats import FORMATS
from mgpu_ddp.output.manifest import ARRAY, MANIFEST, Manifest
from mgpu_ddp.output.parts import PartWriter, open_writer
from mgpu_ddp.output.run_folder import RunFolder
from mgpu_ddp.output.verify import prove
from tests.support import crashing
from tests.support.crashing import CLASS_NAMES, SCENARIOS, Ended, Job, attempt, check_whole, rows_of
from tests.support.disk import Steps, watching
from tests.support.samples import texts

REPOSITORY = Path(__file__).parents[2]
THOROUGH = "MGPU_DDP_EVERY_STEP" in os.environ
EVERY = {"parquet": 1, "npy": 1, "csv": 3, "jsonl": 3} if THOROUGH else {"parquet": 8, "npy": 5, "csv": 9, "jsonl": 9}
CASES = [*(f"{how}/{name}" for how in ("parquet", "npy") for name in SCENARIOS), "csv/retried", "jsonl/retried"]
LENGTHS = 20
JOB = Job(how="csv", numbers=tuple(range(6)), unreadable=frozenset({1}))


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in memory where there is such a place: thousands of fsyncs are cheap there."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def outcome() -> dict[str, Any]:
    """Run, kill and resume the scenarios in two plain processes, side by side."""
    memory = Path("/dev/shm")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        processes = []
        for number, is_parquet in enumerate((True, False)):
            cases = [f"{case}/{EVERY[case.partition('/')[0]]}" for case in CASES]
            chosen = [case for case in cases if case.startswith("parquet") == is_parquet]
            command = [sys.executable, "-m", "tests.support.crashing", f"{folder}/{number}", *chosen]
            pipe = subprocess.PIPE
            processes.append(subprocess.Popen(command, cwd=REPOSITORY, stdout=pipe, stderr=pipe, text=True))
        for process in processes:
            out, err = process.communicate(timeout=400)
            assert process.returncode == 0, err
            found |= json.loads(out)
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_job_that_is_killed_at_any_step_keeps_its_promises_and_resumes(case: str, outcome: dict[str, Any]) -> None:
    report = outcome[case]
    steps, every = report["steps"], EVERY[case.partition("/")[0]]
    writes = steps.count("write")
    assert report["broken"] == []
    assert {"open", "write", "fsync", "close", "replace"} <= set(steps)
    assert writes >= 8
    assert len(steps) >= 55
    assert abs(report["killed"] - (len(steps) + writes) / every) <= 2
    assert abs(report["torn"] - writes / every) <= (writes / 2 if every > 1 else 0)
    assert report["ended"] == 1
    assert report["power_cuts"] + report["torn"] == report["killed"] + 1


def dead_writer(run_dir: Path, job: Job, files: Listing) -> tuple[PartWriter, Any]:
    """The writer of an attempt that is taken for dead, and rows that nobody else would write."""
    writer = open_writer(run_dir, job.how, lambda indices: texts(f"late {i}" for i in indices), CLASS_NAMES, "dead", 0)
    return writer, rows_of(replace(job, salt=9), files, np.arange(2), again=False)


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("when", ["claimed", "prefix", "complete"])
def test_a_part_that_comes_late_never_counts(place: Path, how: str, when: str) -> None:
    job, files = replace(JOB, how=how), Listing.build(JOB.names)
    attempt(place / "whole", job, "b")
    attempt(place / "run", replace(job, stop_at=0), "a")
    writer, rows = dead_writer(place / "run", job, files)
    late: list[str] = []

    def told(what: str, _value: int) -> None:
        if what == when and not late:
            late.append(writer.write(rows).file)

    attempt(place / "run", job, "b", told=told)
    manifest = Manifest.read(place / "run")
    assert manifest is not None
    assert len(late) == 1
    assert late[0] not in {part.file for part in manifest.parts}
    assert crashing.listed_rows(place / "run", manifest) == Ended.of(place / "whole").rows
    # After the end nobody is there to delete it, until the next start.
    assert (place / "run" / late[0]).exists() == (when == "complete")
    attempt(place / "run", job, "c")
    assert Ended.of(place / "run") == Ended.of(place / "whole")


class Meeting:
    """A late writer that stops before one of its steps until a claim has come to one of its own, or to its end."""

    def __init__(self, root: Path, attic: Path, late_step: int, claim_step: int) -> None:
        self._steps = Steps(root=root, attic=attic, reached=self._reached)
        self._stops = {True: late_step, False: claim_step}
        self._counts = {True: 0, False: 0}
        self._late_stopped, self._go_on, self._late_done = threading.Event(), threading.Event(), threading.Event()
        self.late_error: Exception | None = None
        self.stopped = {True: False, False: False}
        """The late writer, and the claim, had a step of that number."""

    def run(self, late: Callable[[], object], claim: Callable[[], object]) -> None:
        def work() -> None:
            try:
                late()
            except WriteError as error:
                self.late_error = error
            finally:
                self._late_stopped.set()
                self._late_done.set()

        thread = threading.Thread(target=work, name="late", daemon=True)
        with watching(self._steps):
            thread.start()
            assert self._late_stopped.wait(20)
            try:
                claim()
            finally:
                self._go_on.set()
                thread.join(20)

    def _reached(self, _number: int) -> None:
        late = threading.current_thread().name == "late"
        number = self._counts[late]
        self._counts[late] += 1
        if number != self._stops[late]:
            return
        self.stopped[late] = True
        if late:
            self._late_stopped.set()
            assert self._go_on.wait(20)
        else:
            self._go_on.set()
            assert self._late_done.wait(20)


def test_a_late_writer_and_a_claim_that_meet_at_any_step_do_not_harm_each_other(place: Path) -> None:
    files = Listing.build(JOB.names)
    attempt(place / "whole", JOB, "b")
    whole = Ended.of(place / "whole")
    attempt(place / "before", replace(JOB, stop_at=4), "a")
    found = Manifest.read(place / "before")
    assert found is not None
    # What nobody listed is there as well.
    writer = open_writer(place / "before", "csv", lambda indices: no_names(len(indices)), None, "unlisted", 0)
    writer.write(rows_of(JOB, files, np.arange(4, 6), again=False))
    met, outcomes = [], []
    late_step = claim_step = 0
    while True:
        home, attic = place / "disk/run", place / "attic"
        shutil.copytree(place / "before", home)
        attic.mkdir()
        writer, rows = dead_writer(home, JOB, files)

        def claim(home: Path = home) -> None:
            with RunFolder.place(home) as folder:
                wanted = replace(found, parts=[], world_sizes=[])
                folder.claim(wanted, files, resume=True, batch_size_given=False, array_shape=None)

        meeting = Meeting(home.parent, attic, late_step, claim_step)
        meeting.run(functools.partial(writer.write, rows), claim)
        manifest = Manifest.read(home)
        assert manifest is not None
        assert manifest.parts == found.parts
        attempt(home, JOB, "b")
        assert Ended.of(home) == whole
        check_whole(home)
        shutil.rmtree(home.parent)
        shutil.rmtree(attic)
        outcomes.append(meeting.late_error is None)
        met.append((late_step, claim_step))
        if meeting.stopped[False]:
            claim_step += 1
        else:
            late_step, claim_step = late_step + 1, 0
        if not meeting.stopped[True]:
            break
    assert len(met) > 60
    assert max(met) >= (6, 0)
    assert set(outcomes) == {True, False}, "the late writer both succeeds and fails"


def test_a_late_window_of_the_array_that_differs_is_never_accepted(place: Path) -> None:
    job, files = replace(JOB, how="npy"), Listing.build(JOB.names)
    attempt(place / "run", replace(job, stop_at=4), "a")
    before = (place / "run" / ARRAY).read_bytes()
    manifest = Manifest.read(place / "run")
    assert manifest is not None
    writer, rows = dead_writer(place / "run", job, files)
    writer.write(rows_of(job, files, np.arange(2), again=False))
    assert (place / "run" / ARRAY).read_bytes() == before, "the same rows are the same bits"
    writer.write(rows)
    with pytest.raises(ProofError, match="has other bytes than were committed"):
        prove(place / "run", manifest)
    with pytest.raises(ProofError, match="has other bytes than were committed"):
        attempt(place / "run", job, "b")


def race(path: Path, attic: Path, when: int) -> str:
    """Who comes too late where another makes the same file before step `when` of mine."""
    losers = []
    attic.mkdir()

    def reached(number: int) -> None:
        if number == when:
            steps.reached = lambda _number: None
            try:
                create_file(path, lambda file: file.write(b"theirs" * 100))
            except FileExistsError:
                losers.append("they")

    steps = Steps(root=path.parent, attic=attic, reached=reached)
    with watching(steps):
        try:
            create_file(path, lambda file: file.write(b"mine" * 100))
        except FileExistsError:
            losers.append("I")
    (loser,) = losers
    return loser


def test_a_name_goes_to_whoever_links_it_first_and_stays_whole(place: Path) -> None:
    disk = place / "disk"
    disk.mkdir()
    # open, write, fsync, close, link, unlink, fsync of the folder
    for when, loser in enumerate(["I"] * 5 + ["they"] * 2):
        path = disk / str(when)
        assert race(path, place / f"attic{when}", when) == loser
        assert path.read_bytes() == (b"theirs" if loser == "I" else b"mine") * 100
    assert sorted(path.name for path in disk.iterdir()) == [str(when) for when in range(7)]


@pytest.mark.parametrize("how", ["parquet", "npy"])
@pytest.mark.parametrize("stop_at", [None, 4], ids=["complete", "incomplete"])
def test_a_truncated_file_is_refused_or_predicted_again(place: Path, how: str, stop_at: int | None) -> None:
    job = replace(JOB, how=how)
    attempt(place / "whole", job, "b")
    whole = Ended.of(place / "whole")
    attempt(place / "before", replace(job, stop_at=stop_at), "a")
    found = Manifest.read(place / "before")
    assert found is not None
    committed = [MANIFEST, FILE_NAME, *dict.fromkeys(part.file for part in found.parts)]
    assert len(committed) >= 3
    chance = random.Random(f"{how} {stop_at}")
    counts = {"refused": 0, "predicted again": 0}
    for file in committed:
        size = (place / "before" / file).stat().st_size
        for length in [0, size - 1, *(chance.randrange(size) for _ in range(LENGTHS - 2))]:
            home = place / "run"
            shutil.copytree(place / "before", home)
            with (home / file).open("r+b") as opened:
                opened.truncate(length)
            claimed: list[int] = []
            refusal: str | None = None
            try:
                attempt(home, job, "c", told=lambda what, value, seen=claimed: seen.append(value))  # type: ignore[misc]
            except UsageError as error:
                refusal = str(error)
            if refusal is not None:
                assert file in (MANIFEST, FILE_NAME), refusal
                assert "\n" not in refusal
                assert (home / file).stat().st_size == length, "what is refused stays as it is"
                counts["refused"] += 1
            else:
                # A manifest without its last line end says all it said.
                assert file not in (MANIFEST, FILE_NAME) or (file == MANIFEST and length == size - 1)
                damaged = [part.first for part in found.parts if part.file == file]
                assert claimed[0] <= min([found.prefix, *damaged])
                assert Ended.of(home) == whole
                check_whole(home)
                counts["predicted again"] += bool(damaged)
            shutil.rmtree(home)
    assert counts["refused"] >= 2 * LENGTHS - 3
    assert counts["predicted again"] == LENGTHS * (len(committed) - 2)
