"""The life of a run folder: place → claim → commit → finish → publish, or failed.

What a crash leaves of it at any moment: parts.py says so for parts and manifest, replace.py for a new result that takes
the place of an older one.
"""

import errno
import fcntl
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import numpy.typing as npt

from mgpu_ddp.data.listing import FILE_NAME, Listing
from mgpu_ddp.errors import UsageError, reason_of
from mgpu_ddp.output.atomic_files import add_folder, is_temporary, replace_bytes, sync_folder
from mgpu_ddp.output.manifest import ARRAY, PARTS, Manifest, Part, write_status
from mgpu_ddp.output.parts import PartWriter, RetriedTable, Table, allocate_array, blank_errors
from mgpu_ddp.output.replace import NEXT, holds_result, is_half_replaced, put_in_place
from mgpu_ddp.output.verify import Proof, prove, write_errors

log = logging.getLogger("mgpu_ddp")

LOCK = ".lock"

Status = Literal["complete", "preempted", "failed"]


@dataclass(kw_only=True, slots=True)
class RunFolder:
    """The run folder of one job. Every rank knows where it is; all else is for rank 0 only, in this order:

    1. `place` ends a replacement that was cut short, and decides whether to work beside an older result.
    2. `claim` refuses another job's folder, locks it and makes it this job's: new, continued or grown.
    3. `mark_running` says so in `status.json`.
    4. `open_table` gives the table to which windows of rows, and retried rows, are committed.
    5. `finish` deletes what nobody listed, proves the rest, derives `errors.jsonl` and marks the outcome.
    6. `publish` puts a complete result in the place of the older one.

    Leaving the block releases the lock; where the block raised, the claimed folder is marked as failed.
    """

    home: Path
    """The folder as the user knows it."""
    beside: bool = False
    """Whether the job works beside an older result until its own is complete."""
    starts_over: bool = False
    """Whether it discards what is there already."""
    before: Manifest | None = None
    """What the folder was begun with, where the job goes on with it."""
    manifest: Manifest | None = None
    """Once it is claimed."""
    _lock: int | None = field(default=None, init=False)

    @property
    def path(self) -> Path:
        """Where the job works."""
        return self.home / NEXT if self.beside else self.home

    @property
    def claimed(self) -> Manifest:
        """The manifest of the claimed folder."""
        assert self.manifest is not None
        return self.manifest

    @classmethod
    def place(cls, home: Path, *, overwrite: bool = False, requeued_job: str = "") -> "RunFolder":
        """Find where a job works that asks for this folder.

        What the SLURM job `requeued_job` began is continued, and not overwritten.

        Raises:
            UsageError: another job holds the folder, or its manifest cannot be read.
        """
        if is_half_replaced(home):
            with holding(home):
                put_in_place(home)
        begun_here = requeued_job and requeued_job in map(_slurm_job_of, (home, home / NEXT))
        starts_over = overwrite and not begun_here and holds_result(home)
        folder = cls(home=home, beside=starts_over or (home / NEXT).exists(), starts_over=starts_over)
        if not starts_over:
            folder.before = Manifest.read(folder.path)
        return folder

    def known_listing(self) -> Listing | None:
        """The listing of a folder that is continued: it alone says which index is which file."""
        return Listing.open(self.path / FILE_NAME) if self.before is not None else None

    def claim(
        self,
        wanted: Manifest,
        files: Listing | None,
        *,
        resume: bool,
        batch_size_given: bool,
        array_columns: int | None,
    ) -> Manifest:
        """Make the folder this job's, before any rank writes. Returns the manifest that holds from now on.

        `wanted` is the manifest of a fresh start; `array_columns` the number of columns where the output is one array.

        Raises:
            UsageError: the folder holds another job, is in use, or cannot be written to.
        """
        # Another job's folder must not even be touched by a lock. What it holds may change until the lock is there.
        self._find_same_job(wanted, files, resume=resume)
        self._lock = hold_folder(self.home)
        found = self._find_same_job(wanted, files, resume=resume)
        manifest = wanted if found is None else self._continued(wanted, found, batch_size_given=batch_size_given)
        try:
            self._make_ours(manifest, found, files, array_columns)
        except OSError as error:
            raise _unwritable(self.path, error) from None
        self.manifest = manifest
        return manifest

    def _find_same_job(self, wanted: Manifest, files: Listing | None, *, resume: bool) -> Manifest | None:
        """The manifest of this same job that the folder holds, None for a fresh start. Touches nothing.

        The same job may have more samples than before at its end, never fewer.

        Raises:
            UsageError: the folder holds something else.
        """
        if self.starts_over:
            return None
        found = Manifest.read(self.path)
        if found is None:
            if holds_result(self.path):
                raise UsageError(
                    f"output.dir must be empty or hold this job, got {str(self.path)!r} with foreign predictions."
                    " Choose another."
                )
            return None
        if not resume:
            raise UsageError(
                f"output.dir must be empty with resume=false, got {str(self.path)!r}."
                " Set overwrite=true or choose another."
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
                f"output.dir must hold this same job, got {str(self.path)!r} with {shown}{more}."
                " Choose another or set overwrite=true."
            )
        return found

    def _continued(self, wanted: Manifest, found: Manifest, *, batch_size_given: bool) -> Manifest:
        """The manifest of a job that goes on with what was found."""
        manifest = replace(
            wanted,
            parts=list(_whole_parts(self.path, found.parts)),
            world_sizes=list(dict.fromkeys([*found.world_sizes, *wanted.world_sizes])),
        )
        if not batch_size_given or (found.complete and found.stop == wanted.stop):
            manifest.batch_size = found.batch_size
        manifest.complete = found.complete and manifest.prefix == manifest.stop
        return manifest

    def _make_ours(
        self, manifest: Manifest, found: Manifest | None, files: Listing | None, array_columns: int | None
    ) -> None:
        if self.starts_over and self.path.exists():
            shutil.rmtree(self.path)
        _add_folders(self.path)
        if found is not None and found.complete and not manifest.complete:
            # Before anything changes that a reader may trust as long as the status says complete.
            write_status(self.path, "running", manifest)
        grown = found is None or found.stop != manifest.stop
        if files is not None and (grown or files.refreshed):
            # Before the manifest, which speaks of its first rows: a listing that is ahead of it does no harm.
            replace_bytes(self.path / FILE_NAME, files.buffer)
        manifest.write(self.path)
        remove_unlisted(self.path, manifest)
        if not manifest.parts:
            (self.path / ARRAY).unlink(missing_ok=True)
        if array_columns is None:
            (self.path / PARTS).mkdir(exist_ok=True)
        else:
            allocate_array(self.path, manifest, array_columns)
            blank_errors(self.path, manifest)

    def mark_running(self) -> None:
        """Say that a job is at work here, unless nothing is left to do."""
        if not self.claimed.complete:
            write_status(self.path, "running", self.claimed)

    def open_table(self, writer: PartWriter, retried: npt.NDArray[np.int64] | None = None) -> Table:
        """The table of the parts that the manifest lists.

        With `retried`, rows that are added take the place of error rows: row i is that of sample retried[i].
        """
        if retried is not None:
            return RetriedTable(self.path, self.claimed, writer, retried)
        return Table(self.path, self.claimed, writer)

    def finish(self, status: Status, path_of: Callable[[int], str | None], reason: str | None = None) -> Proof:
        """Prove what the folder holds, and mark it. No rank writes any more.

        Raises:
            ProofError: folder and manifest disagree, or a complete table lacks rows or holds some twice.
        """
        manifest, output_format = self.claimed, self.claimed.output_format
        # Ranks past the first one that stopped, or a late writer of a dead attempt, have left what nobody committed.
        remove_unlisted(self.path, manifest)
        proof = prove(self.path, manifest, output_format)
        if status == "complete":
            proof.check_exact("the table")
        write_errors(self.path, manifest, output_format, path_of)
        manifest.complete = status == "complete"
        manifest.write(self.path)
        write_status(self.path, status, manifest, reason)
        return proof

    def publish(self) -> None:
        """Put a complete result in the place of the older one beside which it was made."""
        if self.beside and self.claimed.complete:
            put_in_place(self.home)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, Exception) and self.manifest is not None:
                self._mark_failed(reason_of(error))
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def _mark_failed(self, reason: str) -> None:
        try:
            # What is on disk counts, not what a failed commit left in memory.
            manifest = Manifest.read(self.path)
            if manifest is not None and not manifest.complete:
                write_status(self.path, "failed", manifest, reason)
        except (OSError, UsageError) as error:
            log.error("%s cannot say that the job failed: %s", self.path / "status.json", error)


def _slurm_job_of(folder: Path) -> str:
    """The SLURM job that began the job of a folder."""
    manifest = Manifest.read(folder)
    return manifest.slurm_job if manifest else ""


def _whole_parts(run_dir: Path, parts: list[Part]) -> Iterator[Part]:
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


def hold_folder(run_dir: Path) -> int:
    """Keep other jobs out of a folder while the returned file descriptor is open. Rank 0 only.

    A POSIX record lock: the kernel drops it with its process, however that dies, and NFS servers carry it. It is
    advisory, and a file system mounted without locks refuses it, which is an error here rather than a risk.

    Raises:
        UsageError: another job holds the folder, or it cannot be written to.
    """
    try:
        _add_folders(run_dir)
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


def _add_folders(folder: Path) -> None:
    for path in _missing(folder):
        add_folder(path)


def _missing(folder: Path) -> list[Path]:
    return [path for path in [*reversed(folder.parents), folder] if not path.exists()]


def _unwritable(run_dir: Path, error: OSError) -> UsageError:
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
        raise _unwritable(folder, error) from None
    return made


def remove_empty(folders: list[Path]) -> None:
    """Remove folders as far as they are empty: a refused command leaves no trace."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
