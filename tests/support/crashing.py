"""A job without a model, killed at every step it takes on disk, then resumed: run as a plain process.

python -m tests.support.crashing FOLDER HOW/SCENARIO/EVERY...

Rows are drawn from names of files instead of predicted; what puts them on disk is `RunFolder`, as in the program.
Nothing here imports torch, so that a job takes milliseconds and a killed one is a fork. Prints one JSON object: what
was tried and what went wrong.
"""

import functools
import gc
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow

from mgpu_ddp.data.listing import FILE_NAME, Listing, readable
from mgpu_ddp.output.columns import ColumnType, as_json
from mgpu_ddp.output.formats import FORMATS, to_table
from mgpu_ddp.output.layout import NEXT
from mgpu_ddp.output.manifest import ARRAY, MANIFEST, Manifest
from mgpu_ddp.output.parts import CHANGED, array_digest, open_writer
from mgpu_ddp.output.replace import is_half_replaced
from mgpu_ddp.output.rows import Rows
from mgpu_ddp.output.run_folder import RunFolder
from mgpu_ddp.output.verify import error_rows, prove
from tests.support.disk import Steps, Unsynced, cut_power, watching

CLASSES = 3
CLASS_NAMES = ("ant", "bee", "cat")
WINDOW = 2
SCENARIOS = ("fresh", "retried", "grown", "replaced", "changed")

Told = Callable[[str, int], None]


def ignore(_what: str, _value: int) -> None:
    """Nobody asks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Stands for the command line."""

    how: str
    numbers: tuple[int, ...]
    """The files that are found."""
    salt: int = 0
    """Another model has another one."""
    unreadable: frozenset[int] = frozenset()
    readable_again: frozenset[int] = frozenset()
    """The unreadable ones that a retry can read."""
    retry: bool = False
    contents: tuple[int, ...] = ()
    """What tells the content of each file, where that is known; another content gives other rows."""
    before: tuple[int, ...] = ()
    """The contents when the older job ran."""
    overwrite: bool = False
    stop_at: int | None = None
    """The prefix at which it is given up."""

    @property
    def names(self) -> list[bytes]:
        return sorted(name_of(number) for number in self.numbers)

    @property
    def columns(self) -> int | None:
        return CLASSES if self.how == "npy" else None

    def content_of(self, number: int) -> int:
        return self.contents[self.numbers.index(number)] if self.contents else 0

    @property
    def content(self) -> dict[str, Any]:
        """The column of a listing that tells it, in the order of the names."""
        if not self.contents:
            return {}
        return {"modified_ns": pyarrow.array([self.content_of(number_of(name)) for name in self.names])}


def name_of(number: int) -> bytes:
    return f"class{number % 3}/image,\n☃ {number:03}.png".encode()


def number_of(name: bytes) -> int:
    return int(name[-7:-4])


@functools.cache
def logits_of(salt: int, number: int, content: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng([salt, number, content]).standard_normal(CLASSES).astype(np.float32)


def rows_of(job: Job, files: Listing, index: npt.NDArray[np.int64], *, again: bool) -> Rows:
    """Rows as the job's model would make them; `again` where samples are retried."""
    numbers = [number_of(files.path(i)) for i in index.tolist()]
    logits = np.stack([logits_of(job.salt, number, job.content_of(number)) for number in numbers])
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    errors = {}
    for i, number in zip(index.tolist(), numbers, strict=True):
        if number in job.unreadable and not (again and number in job.readable_again):
            errors[i] = f'OSError: "cannot",\nread {number} {"again" if again else "at first"}'
    columns: dict[str, Any] = {
        "pred": probs.argmax(axis=1).astype(np.int32),
        "prob": probs.max(axis=1).astype(np.float32),
    }
    if job.how != "parquet":
        columns["logits"] = logits
    return Rows(
        index=index,
        label=np.array([files.label(i) for i in index.tolist()], dtype=np.int32),
        columns=columns,
        errors=errors,
    )


def types_of(job: Job) -> list[ColumnType]:
    files = Listing.build(job.names)
    rows = rows_of(replace(job, contents=()), files, np.arange(1), again=False)
    return [ColumnType.of(name, column) for name, column in rows.columns.items()]


def attempt(home: Path, job: Job, token: str, *, first: bool = True, told: Told = ignore) -> None:
    """One attempt at a job, from its start to its end; `first` unless an earlier one of its launch claimed."""
    with RunFolder.place(home, overwrite=job.overwrite and first) as folder:
        known = folder.known_listing()
        files = Listing.build(job.names, **job.content) if known is None else known.grown(job.names, **job.content)
        wanted = Manifest(
            fingerprint={"salt": job.salt, "output.format": job.how, "listing": files.digest(len(files))},
            start=0,
            stop=len(files),
            batch_size=4,
            columns=as_json(types_of(job)),
        )
        manifest = folder.claim(
            wanted,
            files,
            resume=True,
            batch_size_given=False,
            array_shape=None if job.columns is None else (job.columns,),
        )
        told("claimed", manifest.prefix)
        told("errors", manifest.errors)
        changed = folder.changed_rows()
        told("changed", len(changed))
        folder.mark_running()
        files = Listing.open(folder.path / FILE_NAME)
        predict(folder, job, files, token, told)
        if changed:
            predict_again(folder, job, files, changed, token, told)
        if job.stop_at is None:
            folder.finish("complete", lambda index: readable(files.path(index)))
            folder.publish()
            told("complete", 1)


def predict(folder: RunFolder, job: Job, files: Listing, token: str, told: Told) -> None:
    """Commit the rows window by window, then those of a retry, as the collector does."""
    manifest = folder.claimed
    writer = open_writer(folder.path, job.how, files.names, CLASS_NAMES, token, manifest.start)
    table = folder.open_table(writer)
    stop = manifest.stop if job.stop_at is None else job.stop_at
    number = 0
    while manifest.prefix < stop:
        first, number = manifest.prefix, number + 1
        cuts = [min(stop, first + WINDOW), min(stop, first + 2 * WINDOW)]
        if number % 2:
            table.add(rows_of(job, files, np.arange(first, cuts[0]), again=False))
        else:
            # Each rank has written its own.
            stretches = [(a, b) for a, b in ((first, cuts[0]), tuple(cuts)) if a < b]
            table.list([writer.write(rows_of(job, files, np.arange(a, b), again=False)) for a, b in stretches])
        told("prefix", manifest.prefix)
    if job.retry and job.stop_at is None:
        failed = error_rows(folder.path, manifest, lambda index: readable(files.path(index)))
        chosen = [index for index, _, _ in failed]
        if chosen:
            predict_again(folder, job, files, chosen, token, told)


def predict_again(folder: RunFolder, job: Job, files: Listing, chosen: list[int], token: str, told: Told) -> None:
    """Commit rows in the place of error rows, window by window."""
    writer = open_writer(folder.path, job.how, files.names, CLASS_NAMES, token, folder.claimed.start)
    table = folder.open_table(writer, np.array(chosen, dtype=np.int64))
    for first in range(0, len(chosen), WINDOW):
        window = np.array(chosen[first : first + WINDOW], dtype=np.int64)
        rows = rows_of(job, files, window, again=True)
        errors = {first + int(np.searchsorted(window, i)): reason for i, reason in rows.errors.items()}
        table.add(replace(rows, index=np.arange(first, first + len(window)), errors=errors))
        told("retried", folder.claimed.errors)


def listed_rows(folder: Path, manifest: Manifest) -> list[Any]:
    """The rows that the manifest lists, in its order, whatever the format."""
    rows: list[Any] = []
    how = manifest.output_format
    for part in manifest.parts:
        if how == "npy":
            array = np.load(folder / ARRAY)[part.first : part.stop]
            for index, values in enumerate(array.tolist(), part.first):
                reason = part.reasons.get(str(index))
                rows.append((index, values if reason is None else None, reason))
        else:
            rows += rows_in(how, (folder / part.file).read_bytes(), folder / part.file)
    return rows


KNOWN_ROWS: dict[bytes, list[Any]] = {}


def rows_in(how: str, data: bytes, path: Path) -> list[Any]:
    """The rows of a part; the same bytes are read once."""
    if data not in KNOWN_ROWS:
        KNOWN_ROWS[data] = FORMATS[how].read(path, schema_of(how)).to_pylist()
    return KNOWN_ROWS[data]


@functools.cache
def schema_of(how: str) -> Any:
    files = Listing.build([name_of(0)])
    return to_table(
        rows_of(Job(how=how, numbers=(0,)), files, np.arange(1), again=False), files.names(np.arange(1)), CLASS_NAMES
    ).schema


@functools.cache
def acceptable(job: Job, count: int, *older: int) -> list[list[Any]]:
    """The choices for row i of the job at any time: as predicted at first, and as a retry makes it.

    `older` is the number of files that were there at first, where more have come.
    """
    files = Listing.build(Job(how=job.how, numbers=job.numbers[: older[0] if older else count]).names)
    files = files.grown(job.names)
    found: list[list[Any]] = [[] for _ in range(count)]
    cases = [(job, again) for again in (False, True) if job.retry or job.before or not again]
    made = [rows_of(each, files, np.arange(count), again=again) for each, again in cases]
    if job.before:
        old = rows_of(replace(job, contents=job.before), files, np.arange(count), again=False)
        numbers = [number_of(files.path(i)) for i in range(count)]
        places = [job.numbers.index(number) for number in numbers]
        changed = [i for i, place in enumerate(places) if job.contents[place] != job.before[place]]
        made += [old, replace(old, errors=old.errors | dict.fromkeys(changed, CHANGED))]
    for rows in made:
        if job.how == "npy":
            values = rows.columns["logits"].tolist()
            one = [(i, None if i in rows.errors else values[i], rows.errors.get(i)) for i in range(count)]
        else:
            table = to_table(rows, files.names(np.arange(count)), CLASS_NAMES)
            one = table.to_pylist()
        for choices, row in zip(found, one, strict=True):
            choices.append(row)
    return found


class BrokenError(Exception):
    """A promise that a folder does not keep."""


def demand(holds: bool, text: object) -> None:
    if not holds:
        raise BrokenError(str(text))


def check_listed(folder: Path, manifest: Manifest, choices: list[list[Any]]) -> None:
    """The parts that a manifest lists are there and whole, and hold a prefix of the right rows."""
    first = manifest.start
    for part in manifest.parts:
        demand(part.first == first, f"{part.file} begins at {part.first}, not at {first}")
        first = part.stop
        path = folder / part.file
        demand(path.exists(), f"{folder.name}/{part.file} is listed and not there")
        if part.file == ARRAY:
            digest = array_digest(np.load(path), part, manifest.start)
        else:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            demand(path.stat().st_size == part.num_bytes, f"{part.file} is not as long as listed")
        demand(digest == part.sha256, f"{folder.name}/{part.file} holds other bytes than listed")
    rows = listed_rows(folder, manifest)
    demand(len(rows) == manifest.prefix - manifest.start, f"{len(rows)} rows in parts up to {manifest.prefix}")
    for i, row in enumerate(rows):
        demand(row in choices[i], f"row {i} is {row}, not one of {choices[i]}")
    files = Listing.open(folder / FILE_NAME)
    demand(files.digest(manifest.stop) == manifest.fingerprint["listing"], "the listing is another than the manifest's")


def check_whole(folder: Path) -> None:
    """A folder that `status.json` calls complete is complete, and nothing else lies among the parts."""
    try:
        status = json.loads((folder / "status.json").read_text())
    except FileNotFoundError:
        return
    if status["status"] != "complete":
        return
    manifest = Manifest.read(folder)
    demand(manifest is not None and manifest.complete, "complete, but not in its manifest")
    assert manifest is not None
    proof = prove(folder, manifest)
    demand((proof.rows, proof.missing, proof.duplicates) == (proof.total, 0, 0), proof)
    demand(status["counts"]["total"] == manifest.stop, "complete with the counts of another result")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """A finished folder without the borders of its parts, which may lie elsewhere."""

    rows: list[Any]
    files: dict[str, bytes]

    @classmethod
    def of(cls, home: Path) -> "Ended":
        manifest = Manifest.read(home)
        demand(manifest is not None and manifest.complete, "ended without a complete manifest")
        assert manifest is not None
        parts = {part.file for part in manifest.parts} - {ARRAY}
        names = {str(path.relative_to(home)): path for path in home.rglob("*")}
        files = {
            name: path.read_bytes() if path.is_file() and name not in (".lock", MANIFEST) else b""
            for name, path in names.items()
            if name not in parts
        }
        demand(names.keys() >= parts, "parts are listed and not there")
        return cls(rows=listed_rows(home, manifest), files=files)


@dataclass(kw_only=True)
class Scenario:
    """The job that is killed, the folder in which it starts, and what may be seen of both."""

    job: Job
    older: tuple[Job, ...] = ()
    """Run in the folder before, one after another; the last one that ended is its result."""
    told: dict[str, int] = field(default_factory=dict)
    """Known to be durable from the beginning."""

    def prepare(self, home: Path) -> None:
        for number, job in enumerate(self.older):
            attempt(home, job, f"old{number}")

    def choices(self, manifest: Manifest) -> list[list[Any]]:
        """The rows that a manifest may list."""
        for job in (self.job, *self.older):
            if job.salt == manifest.fingerprint["salt"]:
                grows = job is self.job and not job.overwrite and self.older
                return acceptable(job, manifest.stop, *(len(old.numbers) for old in self.older if grows))
        raise BrokenError(f"nobody's manifest: {manifest.fingerprint}")

    def check_left(self, home: Path, told: dict[str, int]) -> None:
        """The promises that hold at any moment."""
        for folder in (home, home / NEXT):
            manifest = Manifest.read(folder)
            # What is left of an abandoned attempt counts for nothing.
            if manifest is not None and (folder == home or manifest.fingerprint["salt"] == self.job.salt):
                check_listed(folder, manifest, self.choices(manifest))
        check_whole(home)
        if (self.older and self.job.overwrite and not is_half_replaced(home)) or told.get("complete"):
            Ended.of(home)

    def resume(self, home: Path, told: dict[str, int], wanted: Ended) -> None:
        """The next attempt goes on where the dead one was, and ends as if nobody had been killed."""
        seen: dict[str, int] = {}
        attempt(home, self.job, "b", first="claimed" not in told, told=lambda what, value: seen.setdefault(what, value))
        demand(
            seen["claimed"] >= told.get("prefix", 0), f"{told.get('prefix')} rows were durable, got {seen['claimed']}"
        )
        if "retried" in told:
            demand(seen["errors"] <= told["retried"], "rows that a retry could read are gone")
        ended = Ended.of(home)
        demand(ended.rows == wanted.rows, f"{ended.rows} instead of {wanted.rows}")
        names = sorted(ended.files.keys() ^ wanted.files.keys())
        demand(not names, f"{names} on one side only")
        differing = [name for name in wanted.files if ended.files[name] != wanted.files[name]]
        demand(not differing, f"{differing} differ")
        check_whole(home)


def scenario(name: str, how: str) -> Scenario:
    bad = frozenset({1, 2})
    job = Job(how=how, numbers=tuple(range(6)), unreadable=bad, readable_again=frozenset({2}))
    if name == "fresh":
        return Scenario(job=replace(job, unreadable=frozenset({2}), retry=True))
    if name == "retried":
        return Scenario(job=replace(job, retry=True), older=(job,), told={"prefix": 6})
    if name == "grown":
        # Names that come between those that are there, which keep their places.
        grown = replace(job, numbers=(1, 2, 4, 6, 7, 0, 3, 5))
        return Scenario(job=grown, older=(replace(job, numbers=grown.numbers[:5]),), told={"prefix": 5})
    if name == "changed":
        numbers = (1, 2, 4, 6, 7, 0, 3, 5)
        job = replace(job, numbers=numbers, contents=tuple(9 * (n in (1, 4, 7)) for n in numbers), before=(0,) * 8)
        older = replace(job, numbers=numbers[:5], contents=(0,) * 5, before=())
        return Scenario(job=job, older=(older,), told={"prefix": 5})
    # Beside the result lies what an abandoned attempt to replace it has left.
    old = replace(job, numbers=tuple(range(5)), salt=1)
    left = replace(job, salt=2, overwrite=True, stop_at=4)
    return Scenario(job=replace(job, overwrite=True), older=(old, left))


@dataclass(kw_only=True)
class Report:
    """The cases that were tried, and the promises that broke."""

    steps: list[str] = field(default_factory=list)
    killed: int = 0
    ended: int = 0
    """Cases without a kill, but with a power cut after the end."""
    torn: int = 0
    power_cuts: int = 0
    broken: list[str] = field(default_factory=list)


def child(work: Callable[[], None]) -> int:
    """The wait status of a process that does this work."""
    process = os.fork()
    if process == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitpid(process, 0)[1]


def run_until(
    case: Path, before: Path | None, scene: Scenario, kill_at: int | None, *, torn: bool
) -> tuple[int, Unsynced]:
    """The scenario's job, killed before a step or in the middle of it: its wait status and what is not synced."""
    home, attic = case / "disk/run", case / "attic"
    attic.mkdir(parents=True)
    home.parent.mkdir()
    if before is not None:
        shutil.copytree(before, home)

    def work() -> None:
        def reached(number: int) -> None:
            if number == kill_at and not torn:
                steps.die()

        steps = Steps(
            root=home.parent,
            attic=attic,
            reached=reached,
            torn=kill_at if torn else None,
            dump=case / "dump",
            state=Unsynced(told=dict(scene.told)),
        )
        with watching(steps):
            attempt(home, scene.job, "a", told=steps.state.told.__setitem__)
        steps.save()

    status = child(work)
    return status, pickle.loads((case / "dump").read_bytes())


def try_all(name: str, how: str, place: Path, every: int) -> Report:
    """Kill the scenario's job at every step, or at each of `every` steps."""
    scene = scenario(name, how)
    report = Report()
    before = None
    if scene.older:
        before = place / "before"
        scene.prepare(before)
    whole = place / "whole"
    status, state = run_until(whole, before, scene, None, torn=False)
    demand(status == 0, "the undisturbed run failed")
    wanted = Ended.of(whole / "disk/run")
    hidden = [name for name in wanted.files if Path(name).name.startswith(".") and name != ".lock"]
    demand(not hidden, f"{hidden} are left")
    report.steps = state.steps
    cases = [(len(state.steps), False), *((number, False) for number in range(len(state.steps)))]
    cases += [(number, True) for number, what in enumerate(state.steps) if what == "write"]
    cases = [*sorted(cases[1:])[::every], cases[0]]
    for number, torn in cases:
        label = f"{'in' if torn else 'before'} step {number}"
        case = place / f"case {number} {torn}"
        try:
            status, state = run_until(case, before, scene, number, torn=torn)
            ended = number == len(report.steps)
            demand(status == 0 if ended else os.WTERMSIG(status) == signal.SIGKILL, f"wait status {status}")
            report.killed += not ended
            report.ended += ended
            report.torn += torn
            copy, home = case / "copy/run", case / "disk/run"
            copy.parent.mkdir()
            if home.exists():
                shutil.copytree(home, copy)
            scene.check_left(copy, state.told)
            scene.resume(copy, state.told, wanted)
            if torn:
                # The power cut before the next step tears it, too.
                continue
            label += ", without power"
            chance = random.Random(f"{name} {how} {number} {torn}")
            cut_power(home.parent, state, chance, all_of_it=chance.random() < 0.5)
            report.power_cuts += 1
            scene.check_left(home, state.told)
            scene.resume(home, state.told, wanted)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            report.broken.append(
                f"{label}: {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            )
        finally:
            shutil.rmtree(case)
    return report


def main(folder: str, *cases: str) -> None:
    """Try cases one after another."""
    # Tables this small are read faster by one thread, and what is loaded once is forked with everything.
    pyarrow.set_cpu_count(1)
    for how in {case.partition("/")[0] for case in cases}:
        schema_of(how if how in FORMATS else "csv")
    gc.freeze()
    reports = {}
    for case in cases:
        how, name, every = case.split("/")
        place = Path(folder) / how / name
        place.mkdir(parents=True)
        reports[f"{how}/{name}"] = asdict(try_all(name, how, place, int(every)))
    print(json.dumps(reports))


if __name__ == "__main__":
    main(*sys.argv[1:])
