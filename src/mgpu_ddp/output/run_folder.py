"""Whose folder it is: a fresh run folder, one to continue, or one to refuse."""

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mgpu_ddp.data.listing import FILE_NAME, Listing
from mgpu_ddp.errors import UsageError
from mgpu_ddp.output.atomic_files import add_folder, is_temporary, replace_bytes, replace_file, sync_folder
from mgpu_ddp.output.manifest import ARRAY, PARTS, Manifest, Part, write_status
from mgpu_ddp.output.replace import holds_result

LOCK = ".lock"
COPIED_ROWS = 4096


def hold_folder(run_dir: Path) -> int:
    """Keep other jobs out of a folder while the returned file descriptor is open. Rank 0 only.

    A POSIX record lock: the kernel drops it with its process, however that dies, and NFS servers carry it. It is
    advisory, and a file system mounted without locks refuses it, which is an error here rather than a risk.

    Raises:
        UsageError: another job holds the folder, or it cannot be written to.
    """
    try:
        _make_folder(run_dir)
        held = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _unwritable(run_dir, error) from None
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


def _make_folder(folder: Path) -> None:
    for path in [*reversed(folder.parents), folder]:
        if not path.exists():
            add_folder(path)


def _unwritable(run_dir: Path, error: OSError) -> UsageError:
    return UsageError(f"output.dir must be a writable folder, got {str(run_dir)!r} ({error.strerror}). Choose another.")


def claim_folder(
    folder: Path,
    wanted: Manifest,
    *,
    resume: bool,
    overwrite: bool,
    batch_size_given: bool,
    array_columns: int | None,
    files: Listing | None,
) -> Manifest:
    """Make the folder this job's: new, continued or refused. Rank 0 only, before any rank writes.

    `wanted` is the manifest of a fresh start; the manifest that holds from now on comes back. `array_columns` is
    the number of classes where the output is one array.

    Raises:
        UsageError: the folder holds another job, or cannot be written to.
    """
    found = None if overwrite else to_continue(folder, wanted, resume=resume, files=files)
    grown = found is None or found.stop != wanted.stop
    if found is not None:
        if not batch_size_given or (found.complete and not grown):
            wanted.batch_size = found.batch_size
        wanted.parts = list(_whole_parts(folder, found.parts))
        wanted.complete = found.complete and wanted.prefix == wanted.stop
        wanted.world_sizes = list(dict.fromkeys([*found.world_sizes, *wanted.world_sizes]))
    try:
        if overwrite and folder.exists():
            shutil.rmtree(folder)
        _make_folder(folder)
        if found is not None and found.complete and not wanted.complete:
            # Before anything changes that a reader may trust as long as the status says complete.
            write_status(folder, "running", wanted)
        if files is not None and (grown or files.refreshed):
            # Before the manifest, which speaks of its first rows: a listing that is ahead of it does no harm.
            replace_bytes(folder / FILE_NAME, files.buffer)
        wanted.write(folder)
        remove_unlisted(folder, wanted)
        if not wanted.parts:
            (folder / ARRAY).unlink(missing_ok=True)
        if array_columns is None:
            (folder / PARTS).mkdir(exist_ok=True)
        else:
            _allocate_array(folder, wanted, array_columns)
            _blank_errors(folder, wanted)
    except OSError as error:
        raise _unwritable(folder, error) from None
    return wanted


def to_continue(folder: Path, wanted: Manifest, *, resume: bool, files: Listing | None) -> Manifest | None:
    """The manifest of this same job that a folder already holds, None for a fresh start. Touches nothing.

    The same job may have more samples than before at its end, never fewer.

    Raises:
        UsageError: the folder holds something else.
    """
    found = Manifest.read(folder)
    if found is None:
        if holds_result(folder):
            raise UsageError(
                f"output.dir must be empty or hold this job, got {str(folder)!r} with foreign predictions."
                " Choose another."
            )
        return None
    if not resume:
        raise UsageError(
            f"output.dir must be empty with resume=false, got {str(folder)!r}. Set overwrite=true or choose another."
        )
    mine, theirs = dict(wanted.fingerprint), dict(found.fingerprint)
    if files is not None:
        mine["listing"] = files.digest(found.stop)
    if found.start != wanted.start or found.stop > wanted.stop:
        mine["samples"], theirs["samples"] = [wanted.start, wanted.stop], [found.start, found.stop]
    differing = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
    if differing:
        shown = "; ".join(f"{key}={theirs.get(key)!r} there, {mine.get(key)!r} here" for key in differing[:4])
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise UsageError(
            f"output.dir must hold this same job, got {str(folder)!r} with {shown}{more}."
            " Choose another or set overwrite=true."
        )
    return found


def _whole_parts(run_dir: Path, parts: Iterable[Part]) -> Iterator[Part]:
    """The leading parts that are still as they were written; the rest is predicted again."""
    for part in parts:
        if not part.has_its_size(run_dir):
            return
        yield part


def remove_unlisted(folder: Path, manifest: Manifest) -> None:
    """Delete parts that were never committed, and temporaries. Rank 0 only, while no rank writes."""
    listed = {part.file for part in manifest.parts}
    if (folder / PARTS).is_dir():
        for path in (folder / PARTS).iterdir():
            if f"{PARTS}/{path.name}" not in listed:
                # A late writer may have deleted its temporary file itself by now.
                path.unlink(missing_ok=True)
        # Also for parts that a retry has taken from the manifest: none of them may come back.
        sync_folder(folder / PARTS)
    for path in filter(is_temporary, folder.iterdir()):
        path.unlink(missing_ok=True)


def _allocate_array(folder: Path, manifest: Manifest, num_columns: int) -> None:
    """Make `predictions.npy`, or a longer one that begins with the rows of the one that is there."""
    path, rows = folder / ARRAY, manifest.stop - manifest.start
    before = np.load(path, mmap_mode="r") if path.exists() else None
    if before is not None and len(before) == rows:
        return

    def fill(file: BinaryIO) -> None:
        dtype = np.dtype("<f2" if manifest.fingerprint.get("output.dtype") == "fp16" else "<f4")
        header = {"descr": dtype.str, "fortran_order": False, "shape": (rows, num_columns)}
        np.lib.format.write_array_header_1_0(file, header)
        file.flush()
        if rows:
            # Claim the space now: a full disk should say so at the start.
            os.posix_fallocate(file.fileno(), file.tell(), rows * num_columns * dtype.itemsize)
        if before is not None:
            for first in range(0, len(before), COPIED_ROWS):
                file.write(before[first : first + COPIED_ROWS].tobytes())

    replace_file(path, fill)


def _blank_errors(folder: Path, manifest: Manifest) -> None:
    """Make error rows NaN again: a retry that was cut short may have left numbers that nobody listed."""
    failed = [int(index) - manifest.start for part in manifest.parts for index in part.reasons]
    if failed:
        array = np.load(folder / ARRAY, mmap_mode="r+")
        array[failed] = np.nan
        array.flush()


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and return what was made, deepest first, so that `remove_empty` can undo it.

    Raises:
        UsageError: it cannot be made or written to.
    """
    made: list[Path] = []
    try:
        for path in [*reversed(folder.parents), folder]:
            if not path.exists():
                add_folder(path)
                made.insert(0, path)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        remove_empty(made)
        raise UsageError(
            f"output.dir must be a writable folder, got {str(folder)!r} ({error.strerror}). Choose another."
        ) from None
    return made


def remove_empty(folders: list[Path]) -> None:
    """Remove folders as far as they are empty: a refused command leaves no trace."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
