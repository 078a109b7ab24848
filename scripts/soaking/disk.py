"""What a machine that loses its power does to a run folder, and dying at a chosen operation on it.

Every operation that makes something durable passes through here: os.fsync, os.link, os.replace, os.unlink and the
flush of a mapped array. Each rank writes them down in a journal, from which `lose_power` knows afterwards what may
be lost: the content of a file that was never synced, a name whose folder was not synced since, and the rows of an
array that nobody has listed.
"""

import json
import os
import random
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {"fsync": 0, "link": 1, "replace": 1, "unlink": 0}
"""The functions of os that are watched, with the argument that names what they change."""


@dataclass(kw_only=True, slots=True)
class Death:
    """The operation of a process at which it is to die, and how."""

    number: int
    before: bool
    act: Callable[[str], None]
    """Called with what the operation is; does not return."""


class Journal:
    """Where the ranks of a job write down what they have made durable; outlives them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._path = folder, folder / "journal"
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(self, *entry: object) -> None:
        os.write(self._file, (json.dumps(entry) + "\n").encode())

    def read(self) -> list[list[Any]]:
        return [json.loads(line) for line in self._path.read_text().splitlines()]

    def place_for_old(self, number: int) -> Path:
        return self._folder / f"old-{os.getpid()}-{number}"


class WatchedDisk:
    """Stands between a rank and its disk: counts the operations, notes them, and dies at the chosen one."""

    def __init__(self, journal: Journal, death: Death | None) -> None:
        self._journal, self._death = journal, death
        self._real = {name: getattr(os, name) for name in NAMES}
        self._pid = os.getpid()
        self.count = 0

    def install(self) -> None:
        for name in NAMES:
            setattr(os, name, self._watched(name))
        flush = np.memmap.flush

        def flushed(array: Any) -> None:
            self._perform("flush rows", lambda: flush(array))

        np.memmap.flush = flushed  # type: ignore[assignment,method-assign]

    def _watched(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            # Loader workers inherit this, and what they do is no commit.
            if os.getpid() != self._pid:
                return self._real[name](*args, **options)
            target = args[NAMES[name]]
            path = Path(os.readlink(f"/proc/self/fd/{target}") if name == "fsync" else target)
            return self._perform(f"{name} {_sort(path)}", lambda: self._noted(name, path, args, options))

        return call

    def _perform(self, what: str, operation: Callable[[], Any]) -> Any:
        self.count += 1
        death = self._death if self._death is not None and self._death.number == self.count else None
        if death is not None and death.before:
            death.act(f"before {what}")
        result = operation()
        if death is not None:
            death.act(f"after {what}")
        return result

    def _noted(self, name: str, path: Path, args: Any, options: Any) -> Any:
        real = self._real
        old = None
        if name == "replace" and path.exists():
            old = self._journal.place_for_old(self.count)
            real["link"](path, old)
        result = real[name](*args, **options)
        if name == "fsync" and path.is_dir():
            self._journal.note("folder", str(path))
        elif name == "fsync":
            self._journal.note("synced", *_version(path))
        elif name in ("link", "replace"):
            self._journal.note("named", str(path), old and str(old))
        return result


def _version(path: Path) -> tuple[int, int, int]:
    """What changes with every write to a file, and with every other file that inherits its inode."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


def _sort(path: Path) -> str:
    """What kind of thing a path is, for counting."""
    name = path.name.removeprefix(".")
    for start, kind in {
        "part-": "part",
        "predictions.npy": "array",
        "manifest": "manifest",
        "status": "status",
    }.items():
        if name.startswith(start):
            return kind
    return "folder" if path.is_dir() else "other"


def lose_power(run_dir: Path, journal: Journal, rng: random.Random) -> None:
    """Lose at random what no rank had made durable. Call when all of them are dead."""
    synced: set[tuple[int, ...]] = set()
    unsure: dict[Path, str | None] = {}
    for what, *entry in journal.read():
        if what == "synced":
            synced.add(tuple(entry))
        elif what == "named":
            path = Path(entry[0])
            # Of two changes that were never synced, the older content is the one that is durable.
            unsure[path] = unsure.get(path, entry[1])
        else:
            unsure = {path: old for path, old in unsure.items() if path.parent != Path(entry[0])}
    for path, old in unsure.items():
        if path.exists() and rng.random() < 0.5:
            path.unlink()
            if old is not None:
                os.link(old, path)
    for path in sorted(run_dir.rglob("*")):
        found = path.lstat()
        if stat.S_ISREG(found.st_mode) and path.suffix != ".npy" and _version(path) not in synced:
            os.truncate(path, rng.randint(0, found.st_size))
    _scramble_array(run_dir, rng)


def _scramble_array(run_dir: Path, rng: random.Random) -> None:
    """Put noise into some rows of the array that the manifest does not list."""
    path = run_dir / "predictions.npy"
    if not path.exists():
        return
    manifest = json.loads((run_dir / "manifest.json").read_text())
    done = sum(part["rows"] for part in manifest["parts"])
    array = np.load(path, mmap_mode="r+")
    if done < len(array):
        first = rng.randrange(done, len(array))
        last = rng.randint(first, len(array))
        array[first:last] = np.frombuffer(rng.randbytes(array[first:last].nbytes), "<f4").reshape(-1, array.shape[1])
