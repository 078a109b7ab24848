"""Folders: made, held against other jobs, and removed again while they are empty."""

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mgpu_ddp.errors import UsageError
from mgpu_ddp.output.atomic_files import add_folder

LOCK = ".lock"
HELD_BY = b"held by process "
"""How the text in a lock of ours begins."""


def hold_folder(run_dir: Path) -> int:
    """Keep other jobs out of a folder while the returned file descriptor is open. Rank 0 only.

    A POSIX record lock: the kernel drops it with its process, however that dies, and NFS servers carry it. It is
    advisory, and a file system mounted without locks refuses it, which is an error here rather than a risk.

    Raises:
        UsageError: another job holds the folder, or it cannot be written to.
    """
    try:
        add_folders(run_dir)
        held = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise unwritable(run_dir, error) from None
    said = os.read(held, 500) if stat.S_ISREG(os.fstat(held).st_mode) else b"?"
    # A crash may have torn the text, or left zeros in its place.
    if not HELD_BY.startswith(said.rstrip(b"\0")[: len(HELD_BY)]):
        os.close(held)
        raise UsageError(f"output.dir must not hold a foreign {LOCK}, got {str(run_dir)!r}. Choose another.")
    try:
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = ascii(said.decode(errors="replace").strip())[1:-1] or error.strerror
        os.close(held)
        raise UsageError(
            f"output.dir must not be in use, got {str(run_dir)!r} ({holder}). Wait for that job or choose another."
        ) from None
    os.ftruncate(held, 0)
    os.lseek(held, 0, os.SEEK_SET)
    os.write(held, HELD_BY + f"{os.getpid()} on {socket.gethostname()}\n".encode())
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


def check_utf8(key: str, folder: str) -> None:
    """Require a path in UTF-8, which is what Arrow, YAML and the ranks' store can hold.

    Raises:
        UsageError: it is not.
    """
    try:
        folder.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{key} must be UTF-8 with the working folder before it, got {folder!r}. Choose another, or rename it."
        ) from None


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
