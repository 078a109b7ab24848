"""Folders: made, held against other jobs, and removed again while they are empty."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mgpu_ddp.errors import UsageError
from mgpu_ddp.output.atomic_files import add_folder

LOCK = ".lock"


def hold_folder(run_dir: Path) -> int:
    """Keep other jobs out of a folder while the returned file descriptor is open. Rank 0 only.

    A POSIX record lock: the kernel drops it with its process, however that dies, and NFS servers carry it. It is
    advisory, and a file system mounted without locks refuses it, which is an error here rather than a risk.

    Raises:
        UsageError: another job holds the folder, or it cannot be written to.
    """
    try:
        add_folders(run_dir)
        held = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise unwritable(run_dir, error) from None
    try:
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(held, 500).decode(errors="replace").strip() or error.strerror
        os.close(held)
        raise UsageError(
            f"output.dir must not be in use, got {str(run_dir)!r} ({holder}). Wait for that job or choose another."
        ) from None
    os.ftruncate(held, 0)
    os.write(held, f"held by process {os.getpid()} on {socket.gethostname()}\n".encode())
    return held


@contextmanager
def holding(run_dir: Path) -> Iterator[None]:
    """Keep other jobs out of a folder in the block.

    Raises:
        UsageError: another job holds the folder, or it cannot be written to.
    """
    held = hold_folder(run_dir)
    try:
        yield
    finally:
        os.close(held)


def add_folders(folder: Path) -> None:
    """Make a folder and those above it, each with a durable name."""
    for path in _missing(folder):
        add_folder(path)


def _missing(folder: Path) -> list[Path]:
    return [path for path in [*reversed(folder.parents), folder] if not path.exists()]


def unwritable(run_dir: Path, error: OSError) -> UsageError:
    return UsageError(f"output.dir must be a writable folder, got {str(run_dir)!r} ({error.strerror}). Choose another.")


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and return what was made, deepest first, so that `remove_empty` can undo it.

    Raises:
        UsageError: it cannot be made or written to.
    """
    made: list[Path] = []
    try:
        for path in _missing(folder):
            add_folder(path)
            made.insert(0, path)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        remove_empty(made)
        raise unwritable(folder, error) from None
    return made


def remove_empty(folders: list[Path]) -> None:
    """Remove folders as far as they are empty: a refused command leaves no trace."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
