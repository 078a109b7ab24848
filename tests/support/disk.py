"""Every step that a process takes on disk, counted: to stop it at one, and to take back what was not synced.

`watching` replaces the functions through which Python and numpy change files, for this process and below one folder;
each does what it always does. A step is one opening, write, flush, fsync, close, allocation, rename, link, unlink,
mkdir or rmdir, and files are unbuffered, so that each write is one, too. What a SIGKILL after step k leaves is what
one before step k + 1 leaves, since nothing between two steps touches the disk.

`cut_power` then takes back what a power cut may: any data since the file's last fsync, and of the changes to a
folder since its last fsync all but the first few. A rename is one change, also between two folders.
"""

import builtins
import io
import os
import pickle
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

Place = tuple[int, str]
"""The inode of a folder and a name in it: where the folder itself is may change."""


@dataclass(kw_only=True, slots=True)
class Change:
    """One change of names."""

    kind: str
    folders: frozenset[int]
    """Whose fsync makes it durable."""
    place: Place
    source: Place | None = None
    inode: int = 0
    """The folder that was made or removed."""
    kept: str | None = None
    """Another name of the file that lost this one."""
    durable: bool = False


@dataclass(kw_only=True, slots=True)
class Unsynced:
    """Everything that a power cut may take back."""

    changes: list[Change] = field(default_factory=list)
    synced_bytes: dict[int, int] = field(default_factory=dict)
    """inode → length at its last fsync, of each file with data that is not synced."""
    mapped: list[tuple[int, int, bytes]] = field(default_factory=list)
    """(inode, offset, bytes before) of each row that was written through a mapping."""
    steps: list[str] = field(default_factory=list)
    told: dict[str, int] = field(default_factory=dict)
    """Facts that the process had reason to believe durable."""


@dataclass(kw_only=True)
class Steps:
    """Counts the steps below `root`, and calls `reached` with the number of the next one."""

    root: Path
    attic: Path
    """A folder that keeps what loses its name."""
    reached: Callable[[int], None]
    torn: int | None = None
    """The number of the write after half of whose bytes the process is killed."""
    dump: Path | None = None
    state: Unsynced = field(default_factory=Unsynced)

    def step(self, what: str) -> int:
        number = len(self.state.steps)
        self.reached(number)
        self.state.steps.append(what)
        return number

    def die(self) -> None:
        self.save()
        os.kill(os.getpid(), signal.SIGKILL)

    def save(self) -> None:
        if self.dump is not None:
            handle = REAL["os.open"](self.dump, os.O_WRONLY | os.O_CREAT, 0o600)
            REAL["os.write"](handle, pickle.dumps(self.state))
            os.close(handle)

    def watches(self, path: str) -> bool:
        return path.startswith(f"{self.root}/")

    def place(self, path: str) -> Place:
        folder, name = os.path.split(path)
        return os.stat(folder).st_ino, name

    def keep(self, path: str) -> str:
        kept = self.attic / str(len(self.state.changes))
        REAL["os.link"](path, kept)
        return str(kept)

    def change(self, kind: str, place: Place, **more: Any) -> None:
        folders = {place[0], more["source"][0]} if more.get("source") else {place[0]}
        if kind == "rmdir":
            folders.add(more["inode"])
        self.state.changes.append(Change(kind=kind, folders=frozenset(folders), place=place, **more))

    def synced(self, inode: int) -> None:
        """Make the changes of a folder durable, and those that they cannot be durable without."""
        needed: set[int] = set()
        for change in reversed(self.state.changes):
            if change.durable or inode in change.folders or change.folders & needed:
                change.durable = True
                needed |= change.folders

    def dirty(self, handle: int) -> None:
        status = os.fstat(handle)
        self.state.synced_bytes.setdefault(status.st_ino, status.st_size)

    def write(self, handle: int, data: Any, put: Callable[[Any], int]) -> int:
        view = memoryview(data).cast("B")
        number = self.step("write")
        self.dirty(handle)
        if number == self.torn:
            put(view[: len(view) // 2])
            self.die()
        written = 0
        while written < len(view):
            written += put(view[written:])
        return written


REAL: dict[str, Any] = {
    "open": io.open,
    **{
        f"os.{name}": getattr(os, name)
        for name in (
            *("open", "write", "fsync", "ftruncate", "posix_fallocate"),
            *("rename", "replace", "link", "unlink", "mkdir", "rmdir"),
        )
    },
    "memmap.flush": np.memmap.flush,
}


class WatchedFile(io.FileIO):
    """An unbuffered file whose writes and closing are steps."""

    def __init__(self, path: str, mode: str, steps: Steps) -> None:
        super().__init__(path, mode)
        self._steps = steps

    def write(self, data: Any) -> int:
        return self._steps.write(self.fileno(), data, super().write)

    def close(self) -> None:
        if not self.closed:
            self._steps.step("close")
        super().close()


@contextmanager
def watching(steps: Steps) -> Iterator[None]:
    """Count the steps of the block."""
    for name, function in _watched(steps).items():
        _put(name, function)
    builtins.open = io.open
    # ndarray's own method is in the way of every subclass.
    np.memmap.__setitem__ = _watched_setitem(steps)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for name, function in REAL.items():
            _put(name, function)
        builtins.open = io.open
        del np.memmap.__setitem__


def _put(name: str, function: Any) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr({"": io, "os": os, "memmap": np.memmap}[owner], attribute, function)


def _path(path: Any, dir_fd: int | None = None) -> str:
    text = os.fsdecode(path) if not isinstance(path, int) else os.readlink(f"/proc/self/fd/{path}")
    if not os.path.isabs(text):
        text = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else os.getcwd(), text)
    return text


def _watched(steps: Steps) -> dict[str, Any]:
    def watched_open(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **more: Any) -> Any:
        writes = not isinstance(file, int) and set(mode) & set("wxa+") and steps.watches(_path(file))
        if not writes:
            return REAL["open"](file, mode, buffering, *rest, **more)
        path = _path(file)
        steps.step("open")
        if "r" in mode:
            # For a mapping, whose writes are steps of their own.
            return REAL["open"](file, mode, buffering, *rest, **more)
        assert mode in ("wb", "xb"), mode
        assert not os.path.exists(path), f"{path} is written over in place"
        opened = WatchedFile(path, mode, steps)
        steps.change("made", steps.place(path))
        steps.dirty(opened.fileno())
        return opened

    def os_open(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        full = _path(path, dir_fd)
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or not steps.watches(full):
            return int(REAL["os.open"](path, flags, mode, dir_fd=dir_fd))
        steps.step("open")
        existed = os.path.exists(full)
        opened = int(REAL["os.open"](path, flags, mode, dir_fd=dir_fd))
        if not existed:
            steps.change("made", steps.place(full))
        return opened

    def os_write(handle: int, data: Any) -> int:
        if not steps.watches(_path(handle)):
            return int(REAL["os.write"](handle, data))
        return steps.write(handle, data, lambda view: int(REAL["os.write"](handle, view)))

    def fsync(handle: int) -> None:
        if steps.watches(_path(handle)) or _path(handle) == str(steps.root):
            steps.step("fsync")
            inode = os.fstat(handle).st_ino
            if os.path.isdir(_path(handle)):
                steps.synced(inode)
            else:
                steps.state.synced_bytes.pop(inode, None)
        REAL["os.fsync"](handle)

    def resizing(name: str) -> Any:
        def call(handle: int, *rest: int) -> None:
            if steps.watches(_path(handle)):
                steps.step(name)
                steps.dirty(handle)
            REAL[f"os.{name}"](handle, *rest)

        return call

    def moving(name: str) -> Any:
        def call(source: Any, target: Any) -> None:
            old, new = _path(source), _path(target)
            if not steps.watches(old):
                return REAL[f"os.{name}"](source, target)
            steps.step(name)
            kept = steps.keep(new) if os.path.isfile(new) else None
            before = steps.place(old)
            REAL[f"os.{name}"](source, target)
            steps.change("renamed", steps.place(new), source=before, kept=kept)
            return None

        return call

    def link(source: Any, target: Any) -> None:
        steps.step("link")
        REAL["os.link"](source, target)
        steps.change("made", steps.place(_path(target)))

    def unlink(path: Any, *, dir_fd: int | None = None) -> None:
        full = _path(path, dir_fd)
        if not steps.watches(full) or not os.path.lexists(full):
            return REAL["os.unlink"](path, dir_fd=dir_fd)
        steps.step("unlink")
        kept = steps.keep(full) if os.path.lexists(full) else None
        REAL["os.unlink"](path, dir_fd=dir_fd)
        steps.change("unlinked", steps.place(full), kept=kept)
        return None

    def mkdir(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        full = _path(path, dir_fd)
        if not steps.watches(full) or os.path.lexists(full):
            return REAL["os.mkdir"](path, mode, dir_fd=dir_fd)
        steps.step("mkdir")
        REAL["os.mkdir"](path, mode, dir_fd=dir_fd)
        steps.change("mkdir", steps.place(full), inode=os.stat(full).st_ino)
        return None

    def rmdir(path: Any, *, dir_fd: int | None = None) -> None:
        full = _path(path, dir_fd)
        steps.step("rmdir")
        inode = os.stat(full).st_ino
        REAL["os.rmdir"](path, dir_fd=dir_fd)
        steps.change("rmdir", steps.place(full), inode=inode)

    def flush(array: Any) -> None:
        if array.filename is not None and steps.watches(str(array.filename)):
            steps.step("flush")
            inode = os.stat(array.filename).st_ino
            steps.state.mapped = [record for record in steps.state.mapped if record[0] != inode]
        REAL["memmap.flush"](array)

    return {
        "open": watched_open,
        "os.open": os_open,
        "os.write": os_write,
        "os.fsync": fsync,
        "os.ftruncate": resizing("ftruncate"),
        "os.posix_fallocate": resizing("posix_fallocate"),
        "os.rename": moving("rename"),
        "os.replace": moving("replace"),
        "os.link": link,
        "os.unlink": unlink,
        "os.mkdir": mkdir,
        "os.rmdir": rmdir,
        "memmap.flush": flush,
    }


def _watched_setitem(steps: Steps) -> Any:
    def setitem(array: Any, key: Any, value: Any) -> None:
        if array.filename is None or not steps.watches(str(array.filename)):
            return np.ndarray.__setitem__(array, key, value)
        number = steps.step("write")
        rows = np.arange(len(array))[key]
        inode, width = os.stat(array.filename).st_ino, array.strides[0]
        values = np.broadcast_to(value, (len(rows), *array.shape[1:]))
        if number == steps.torn:
            rows = rows[: len(rows) // 2]
        for row, new in zip(rows.tolist(), values, strict=False):
            steps.state.mapped.append((inode, array.offset + row * width, np.array(array[row]).tobytes()))
            np.ndarray.__setitem__(array, row, new)
        if number == steps.torn:
            steps.die()
        return None

    return setitem


def cut_power(root: Path, state: Unsynced, chance: random.Random, *, all_of_it: bool) -> None:
    """Take back what was not synced: all of it, or as much as chance has it."""
    _take_back_names(root, state, chance, all_of_it=all_of_it)
    for path in [path for path in root.rglob("*") if path.is_file()]:
        status = path.stat()
        if (kept := state.synced_bytes.get(status.st_ino)) is not None:
            if not all_of_it:
                kept = chance.randint(min(kept, status.st_size), status.st_size)
            os.truncate(path, min(kept, status.st_size))
            if chance.random() < 0.5:
                # The length may be on disk before the data.
                os.truncate(path, status.st_size)
        for inode, offset, before in reversed(state.mapped):
            if inode == status.st_ino and (all_of_it or chance.random() < 0.5):
                with path.open("r+b") as file:
                    _restore(file, offset, before[: len(before) if all_of_it else chance.randint(0, len(before))])


def _restore(file: BinaryIO, offset: int, before: bytes) -> None:
    file.seek(offset)
    file.write(before)


def _take_back_names(root: Path, state: Unsynced, chance: random.Random, *, all_of_it: bool) -> None:
    left: dict[int, int] = {}
    for change in state.changes:
        for folder in change.folders:
            left[folder] = left.get(folder, 0) + (not change.durable)
    lasting = {folder: 0 if all_of_it else chance.randint(0, count) for folder, count in sorted(left.items())}
    blocked: set[int] = set()
    gone: set[int] = set()
    undone = []
    for change in state.changes:
        lost = False
        if not change.durable:
            for folder in change.folders:
                lasting[folder] -= 1
            lost = any(lasting[folder] < 0 for folder in change.folders) or bool(change.folders & blocked)
        # What was synced below a folder whose own name was not goes with it.
        if lost or change.folders & gone:
            undone.append(change)
            blocked |= change.folders
            if change.kind == "mkdir":
                gone.add(change.inode)
    where = {os.stat(path).st_ino: path for path in [root, *root.rglob("*")] if path.is_dir()}
    for change in reversed(undone):
        _undo(change, where, root)


def _undo(change: Change, where: dict[int, Path], root: Path) -> None:
    def find(place: Place) -> Path:
        # A folder may have moved since the last look.
        known = where[place[0]]
        if not known.is_dir() or known.stat().st_ino != place[0]:
            where.update({path.stat().st_ino: path for path in [root, *root.rglob("*")] if path.is_dir()})
        return where[place[0]] / place[1]

    path = find(change.place)
    if change.kind == "made":
        path.unlink()
    elif change.kind == "mkdir":
        shutil.rmtree(path)
    elif change.kind == "rmdir":
        path.mkdir()
        where[change.inode] = path
    elif change.kind == "renamed":
        assert change.source is not None
        path.rename(find(change.source))
    if change.kept is not None:
        os.link(change.kept, path)
