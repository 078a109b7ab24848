"""Run folders that somebody has laid a hand on, and what jobs, reports and merges make of them."""

import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from mgpu_ddp.output.manifest import Manifest, write_status
from soaking.hostile_files import make_special
from soaking.hostile_trial import Trial, job, spoil, spoil_value
from tests.support.runs import make_images
from tests.support.starting import SMALL_IMAGES, Forks, ranks, run

IMAGES = 18
HOWS = ["parquet", "csv", "jsonl", "npy"]
STATES = ["complete", "half done", "complete", "half done", "shards"]
JSON_FILES = ["manifest.json", "manifest.json", "manifest.json", "status.json", "metrics.json", "classes.json"]
OPERATIONS = ["", "", "retry_failed=true", "overwrite=true", "output.commit_every=4", "retry_failed=true batch_size=4"]


class Tamperings:
    """Makes tampered run folders, out of real ones in every format."""

    def __init__(self, work: Path) -> None:
        self._base = base = work / "tampered"
        images = make_images(base / "images", IMAGES)
        images[3].write_bytes(b"no image")
        images[11].write_bytes(images[11].read_bytes()[:90])
        self._words = [*SMALL_IMAGES, "data=folder", f"data.root={base / 'images'}", "output.commit_every=6"]
        for how in HOWS:
            for name, shard in (("whole", []), ("0", ["shard=0/2"]), ("1", ["shard=1/2"])):
                folder = base / how / name
                folder.mkdir(parents=True)
                ended = run(ranks(1, *self._words, f"output.format={how}", f"output.dir={folder}/run", *shard), folder)
                if ended.code:
                    raise RuntimeError(f"the untouched job did not complete: {ended.err}")
        self._reference = {how: rows_of(base / how / "whole" / "run", how) for how in HOWS}
        self._counts = json.loads((base / HOWS[0] / "whole" / "run" / "status.json").read_text())["counts"]

    def make(self, rng: random.Random, folder: Path) -> Trial:
        """One or two tamperings with a folder, then a job in it, its page, or a merge."""
        how, state, home = rng.choice(HOWS), rng.choice(STATES), folder / "work" / "run"
        (folder / "secret").write_text("nobody may change this")
        names = ["0", "1"] if state == "shards" else ["whole"]
        for name in names:
            shutil.copytree(self._base / how / name / "run", home / name if state == "shards" else home)
        target = home / rng.choice(names) if state == "shards" else home
        if state == "half done":
            _leave_half(home, rng)
        ways = [rng.choice([self._file, self._value, self._value, self._move]) for _ in range(rng.choice([1, 1, 1, 2]))]
        for way in ways:
            way(rng, target)
        command = self._operation(rng, state, how, home)
        is_report = command.arguments[0] == "report"
        return Trial(
            what=f"{how}, {state}, {', '.join(way.__name__ for way in ways)}",
            command=command,
            wrong=(lambda code: "") if is_report else partial(self._wrong, home, how),
            leaves_nothing=False,
            may_make=lambda path: path.startswith("work/"),
            may_change=lambda path: path.startswith("work/"),
        )

    def _operation(self, rng: random.Random, state: str, how: str, home: Path) -> Forks:
        if state == "shards":
            return Forks(function=be_tool, arguments=("merge", f"run={home}"), environs=[{}])
        if rng.random() < 0.15:
            return Forks(function=be_tool, arguments=("report", f"run={home}"), environs=[{}])
        return job(rng, *self._words, f"output.format={how}", f"output.dir={home}", *rng.choice(OPERATIONS).split())

    def _wrong(self, home: Path, how: str, code: int) -> str:
        """Say what is wrong with a table that a job, or a merge, has called complete."""
        try:
            status = json.loads((home / "status.json").read_text())
        except (OSError, ValueError):
            return ""
        if not isinstance(status, dict) or status.get("status") != "complete" or code == 2:
            return ""
        try:
            rows = rows_of(home, how)
        except Exception as error:
            return f"status.json says complete, but {type(error).__name__}: {error}"
        if rows != self._reference[how]:
            return f"{len(rows)} rows, or others than untouched"
        return "" if status["counts"] == self._counts else f"counts are {status['counts']}"

    def _file(self, rng: random.Random, run_dir: Path) -> None:
        """Spoil, empty, delete or exchange one file, or put something else in its place."""
        files = sorted(path for path in run_dir.rglob("*") if path.is_file())
        path, other = rng.choice(files), rng.choice(files)
        data = path.read_bytes()
        ways: list[Callable[[], Any]] = [
            *[lambda: path.write_bytes(spoil(data, rng))] * 6,
            lambda: path.write_bytes(b""),
            lambda: path.write_bytes(other.read_bytes()),
            lambda: path.unlink(),
            lambda: (path.unlink(), make_special(path, rng)),
        ]
        rng.choice(ways)()

    def _value(self, rng: random.Random, run_dir: Path) -> None:
        """Change a value of a JSON file, the manifest's with or without its checksum."""
        path = run_dir / rng.choice(JSON_FILES)
        try:
            value = json.loads(path.read_text())
            if path.name == "manifest.json" and rng.random() < 0.8:
                value.pop("checksum", None)
            if path.name == "manifest.json" and rng.random() < 0.5 and value["parts"]:
                part = rng.randrange(len(value["parts"]))
                value["parts"][part] = spoil_value(value["parts"][part], rng)
            else:
                value = spoil_value(value, rng)
            path.write_text(json.dumps(value))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # The tampering before this one was thorough.
            make_special(run_dir / f"more{rng.random()}", rng)

    def _move(self, rng: random.Random, run_dir: Path) -> None:
        """Rename, double or add files, folders and leftovers of other runs."""
        entries = sorted(path for path in run_dir.rglob("*") if not path.is_symlink())
        path = rng.choice(entries)
        names = [".next", ".ready", ".old", "predictions", "x.csv", *(each.name for each in entries)]
        to = path.parent / rng.choice([*names, f"part-{rng.randrange(20):012d}-ab12.{rng.choice(HOWS[:3])}"])
        if to.exists() or to.is_relative_to(path):
            other = self._base / rng.choice(HOWS) / "whole" / "run"
            ignore = shutil.ignore_patterns(*rng.choice([[".lock"], [".lock"], [".lock", "manifest.json"], []]))
            shutil.copytree(other, run_dir / rng.choice([".next", ".ready", ".old"]), ignore=ignore, dirs_exist_ok=True)
        elif path.is_dir() and rng.random() < 0.5:
            shutil.copytree(path, to, symlinks=True)
        else:
            path.rename(to)


def _leave_half(run_dir: Path, rng: random.Random) -> None:
    """Make of a complete folder one whose job was killed after some windows."""
    manifest = Manifest.read(run_dir)
    assert manifest is not None
    manifest.parts = manifest.parts[: rng.randrange(len(manifest.parts))]
    manifest.complete = False
    manifest.write(run_dir)
    write_status(run_dir, rng.choice(["running", "failed", "preempted"]), manifest)


def rows_of(run_dir: Path, how: str) -> list[Any]:
    """All rows of a run folder, as a reader finds them, and its errors, comparable bit by bit."""
    errors = (run_dir / "errors.jsonl").read_text().splitlines()
    if how == "npy":
        return [*map(bytes, np.load(run_dir / "predictions.npy")), *errors]
    parts = sorted((run_dir / "predictions").glob(f"*.{how}"))
    if how == "parquet":
        return [*(repr(row) for part in parts for row in pq.read_table(part).to_pylist()), *errors]
    return [*(line for part in parts for line in part.read_text().splitlines()[how == "csv" :]), *errors]


def be_tool(name: str, word: str) -> None:
    """Be `python -m mgpu_ddp.merge` or report."""
    import importlib
    import sys

    sys.argv = [name, word]
    importlib.import_module(f"mgpu_ddp.{name}").main()
