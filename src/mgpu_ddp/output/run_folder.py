"""The life of a run folder: place → claim → commit → finish → publish, or failed.

parts.py tells what a crash at any moment leaves of parts and manifest, replace.py what it leaves of a new result that
takes the place of an older one.
"""

import logging
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from mgpu_ddp.data.listing import FILE_NAME, Listing
from mgpu_ddp.errors import ProofError, UsageError, reason_of, words_past
from mgpu_ddp.output.atomic_files import TEMPORARY, replace_bytes, sync_folder
from mgpu_ddp.output.columns import ColumnType
from mgpu_ddp.output.folders import add_folders, hold_folder, holding, unwritable
from mgpu_ddp.output.layout import NEXT, check_layout, check_unclaimed, remove_result, result_in
from mgpu_ddp.output.manifest import ARRAY, PARTS, STATUS, Manifest, Part, write_status
from mgpu_ddp.output.parts import (
    CHANGED,
    Integers,
    PartWriter,
    RetriedTable,
    Table,
    allocate_array,
    blank_errors,
    open_writer,
)
from mgpu_ddp.output.regular_files import read_object
from mgpu_ddp.output.replace import is_half_replaced, put_in_place
from mgpu_ddp.output.verify import Proof, error_rows, prove, write_errors

log = logging.getLogger("mgpu_ddp")


class Numbered(Protocol):
    """A numbering of the samples."""

    def digest(self, stop: int) -> str:
        """Tell the samples before `stop` from those of another dataset."""
        ...


Status = Literal["complete", "preempted", "failed"]
NextCommand = Callable[[tuple[str, ...]], str | None]


@dataclass(kw_only=True, slots=True)
class RunFolder:
    """The run folder of one job. Every rank knows where it is; all else is for rank 0 only, in this order:

    1. `place` completes a replacement that was cut short, and decides whether to work beside an older result.
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
    """Work beside an older result until the job's own is complete."""
    starts_over: bool = False
    """Discard what an earlier job has left in `path`."""
    before: Manifest | None = None
    """The manifest that the job goes on with, as it was found; None for a fresh start."""
    manifest: Manifest | None = None
    """The manifest of the claimed folder."""
    next_command: NextCommand = field(default=lambda _words: None)
    """Gives the command that continues the job with these further overrides, if a command has started it."""
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
        """Decide where a job works that asks for this folder.

        A result that the SLURM job `requeued_job` began is continued, not overwritten.

        Raises:
            UsageError: another job holds the folder, or its manifest cannot be read.
        """
        try:
            check_layout(home)
            if is_half_replaced(home):
                with holding(home):
                    put_in_place(home)
        except OSError as error:
            raise unwritable(home, error) from None
        begun_here = requeued_job and requeued_job in map(_slurm_job_of, (home, home / NEXT))
        starts_over = bool(overwrite and not begun_here and Manifest.read(home))
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
        files: Numbered | None,
        *,
        resume: bool,
        batch_size_given: bool,
        array_shape: tuple[int, ...] | None,
    ) -> Manifest:
        """Make the folder this job's, before any rank writes. Returns the manifest that holds from now on.

        `wanted` is the manifest of a fresh start; `array_shape` that of a row where the output is one array.

        Raises:
            UsageError: the folder holds another job, is in use, or cannot be written to.
        """
        # Another job's folder must not even be touched by a lock. What it holds may change until the lock is there.
        self._find_same_job(wanted, files, resume=resume)
        self._lock = hold_folder(self.home)
        found = self._find_same_job(wanted, files, resume=resume)
        manifest = wanted if found is None else self._continued(wanted, found, batch_size_given=batch_size_given)
        manifest.token = secrets.token_hex(3)
        changed = _changed_within(files, manifest)
        if len(changed):
            manifest.changed, manifest.complete = True, False
        try:
            self._make_ours(manifest, found, files, changed, array_shape)
        except OSError as error:
            raise unwritable(self.path, error) from None
        self.manifest = manifest
        return manifest

    def _find_same_job(self, wanted: Manifest, files: Numbered | None, *, resume: bool) -> Manifest | None:
        """The manifest of this same job that the folder holds, None for a fresh start. Touches nothing.

        The same job may have more samples than before at its end, never fewer.

        Raises:
            UsageError: the folder holds something else.
        """
        check_layout(self.home)
        check_unclaimed(self.home)
        if self.starts_over:
            return None
        found = Manifest.read(self.path)
        if found is None:
            return None
        if not resume:
            raise UsageError(
                f"output.dir must be empty with resume=false, got {str(self.path)!r}."
                " Set overwrite=true or choose another."
            )
        mine, theirs = dict(wanted.fingerprint), dict(found.fingerprint)
        if found.columns and wanted.columns != found.columns:
            mine["columns"], theirs["columns"] = _words(wanted.columns), _words(found.columns)
        if files is not None:
            mine["listing"] = files.digest(found.stop)
        if found.start != wanted.start or found.stop > wanted.stop:
            mine["samples"], theirs["samples"] = [wanted.start, wanted.stop], [found.start, found.stop]
        has_names = wanted.weights != found.weights and found.weights is not None
        if mine.get("model.weights") != theirs.get("model.weights") and has_names:
            mine["model.weights"], theirs["model.weights"] = wanted.weights, found.weights
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
            starts=[*found.starts, *wanted.starts],
            changed=found.changed,
        )
        if not batch_size_given or (found.complete and found.stop == wanted.stop):
            manifest.batch_size = found.batch_size
        manifest.complete = found.complete and manifest.prefix == manifest.stop
        return manifest

    def _make_ours(
        self,
        manifest: Manifest,
        found: Manifest | None,
        files: Numbered | None,
        changed: Integers,
        array_shape: tuple[int, ...] | None,
    ) -> None:
        if self.starts_over and self.path.exists():
            remove_result(self.path)
        add_folders(self.path)
        if found is not None and found.complete and not manifest.complete:
            # Before anything changes that a reader may trust as long as the status says complete.
            write_status(self.path, "running", manifest, next_command=self.next_command(()))
        if found is not None and isinstance(files, Listing) and len(changed):
            # Before the listing, from which a later start learns that they have changed. The parts are those of both.
            before = replace(manifest, stop=found.stop, fingerprint=found.fingerprint)
            before.write(self.path)
            # A token of its own: retries name their parts by the manifest's.
            how, token = manifest.output_format, f"{manifest.token}c"
            Table(self.path, before, open_writer(self.path, how, files.names, None, token, manifest.start)).blank(
                changed
            )
        grown = found is None or found.stop != manifest.stop
        if isinstance(files, Listing) and (grown or files.refreshed):
            # Before the manifest, which speaks of its first rows: a listing that is ahead of it does no harm.
            replace_bytes(self.path / FILE_NAME, files.buffer)
        manifest.write(self.path)
        remove_unlisted(self.path, manifest)
        if not manifest.parts:
            (self.path / ARRAY).unlink(missing_ok=True)
        if array_shape is None:
            (self.path / PARTS).mkdir(exist_ok=True)
        else:
            allocate_array(self.path, manifest, array_shape)
            blank_errors(self.path, manifest)

    def mark_running(self) -> None:
        """Say that a job is at work here, unless nothing is left to do."""
        self.claimed.check_claim(self.path)
        if not self.claimed.complete:
            write_status(self.path, "running", self.claimed, next_command=self.next_command(()))

    def changed_rows(self) -> list[int]:
        """The samples whose images have changed since they were predicted, and that were not predicted again yet."""
        if not self.claimed.changed:
            return []
        rows = error_rows(self.path, self.claimed, lambda index: None)
        return [index for index, _, reason in rows if reason == CHANGED]

    def open_table(self, writer: PartWriter, retried: npt.NDArray[np.int64] | None = None) -> Table:
        """The table of the parts that the manifest lists.

        With `retried`, rows that are added take the place of error rows: row i is that of sample retried[i].
        """
        table = Table(self.path, self.claimed, writer)
        if retried is not None:
            table = RetriedTable(self.path, self.claimed, writer, retried)
        table.next_command = self.next_command(())
        return table

    def finish(
        self,
        status: Status,
        path_of: Callable[[int], str | None],
        reason: str | None = None,
        next_command: str | None = None,
    ) -> Proof:
        """Prove what the folder holds, and mark it. No rank writes any more.

        Raises:
            ProofError: folder and manifest disagree, or a complete table lacks rows or holds some twice.
            StateError: another job has claimed the folder.
        """
        manifest = self.claimed
        manifest.check_claim(self.path)
        if manifest.complete:
            # Nothing was left to do, which is no start worth telling of.
            manifest.starts = manifest.starts[:-1]
        else:
            manifest.count_work(0)
        # Ranks past the first one that stopped, or a late writer of a dead attempt, have left what nobody committed.
        remove_unlisted(self.path, manifest)
        try:
            proof = prove(self.path, manifest)
            if status == "complete":
                proof.check_exact("the table")
        except ProofError as error:
            # It may have been complete before.
            manifest.complete = False
            write_status(self.path, "failed", manifest, reason_of(error), self.next_command(error.words))
            manifest.write(self.path)
            raise
        write_errors(self.path, manifest, path_of)
        manifest.complete = status == "complete"
        manifest.changed = manifest.changed and not manifest.complete
        manifest.write(self.path)
        write_status(self.path, status, manifest, reason, next_command)
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
                self._mark_failed(error)
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def _mark_failed(self, error: Exception) -> None:
        next_command = self.next_command(words_past(error))
        try:
            # What is on disk counts, not what a failed commit left in memory.
            manifest = Manifest.read(self.path)
            if manifest is not None and manifest.token == self.claimed.token and not manifest.complete:
                write_status(self.path, "failed", manifest, reason_of(error), next_command)
        except (OSError, UsageError) as why:
            log.error("%s could not be marked as failed: %s", self.path / STATUS, why)


def _changed_within(files: Numbered | None, manifest: Manifest) -> Integers:
    """Committed rows whose images have changed since."""
    changed = files.changed if isinstance(files, Listing) else np.empty(0, np.int64)
    return changed[(changed >= manifest.start) & (changed < manifest.prefix)]


def _words(columns: list[dict[str, Any]]) -> str:
    return ", ".join(str(ColumnType.read(values)) for values in columns)


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


def mark_lost(home: Path, reason: str) -> None:
    """Mark as failed a job that its rank 0 left without a word. Other jobs are left alone, and so is what is marked.

    Raises:
        OSError: the folder cannot be written to.
        UsageError: a job holds it, or its status cannot be read.
    """
    for folder in (home, home / NEXT):
        if read_object(folder / STATUS).get("status") == "running":
            with holding(home):
                status, manifest = read_object(folder / STATUS), Manifest.read(folder)
                if status.get("status") == "running" and manifest is not None:
                    write_status(folder, "failed", manifest, reason, status.get("next"))


def remove_unlisted(folder: Path, manifest: Manifest) -> None:
    """Delete parts that were never committed, and temporaries. Rank 0 only, while no rank writes."""
    listed = {part.file for part in manifest.parts}
    for name in result_in(folder):
        if TEMPORARY.fullmatch(os.path.basename(name)) or (name.startswith(f"{PARTS}/") and name not in listed):
            # A late writer may have deleted its temporary file itself by now.
            (folder / name).unlink(missing_ok=True)
    if (folder / PARTS).is_dir():
        # Also for parts that a retry has taken from the manifest: none of them may come back.
        sync_folder(folder / PARTS)
