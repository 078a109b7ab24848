"""Rows become durable parts, and how a crash at any moment leaves the run folder.

The commit protocol
-------------------
1. A part is written to a hidden temporary file beside its place, flushed and fsynced.
2. It is linked to its name, which nobody may have yet, the temporary name is unlinked, the folder is fsynced.
3. Then, and only then, rank 0 lists it in `manifest.json`, which is written the same way but renamed over the
   one before.

So, at any moment:

- A part that the manifest lists is durable and whole. Its entry carries row count, size and sha256, so that a
  torn or foreign file cannot pass for it: a start compares the sizes, the final proof every byte.
- A file that the manifest does not list counts for nothing. Whoever starts next deletes it before any rank
  writes, and so does the final proof. Its name carries the token of the attempt that wrote it, and a link never
  replaces anything, so a writer of a dead attempt that wakes up late cannot harm a part of a living one.
- What is done is one number: the committed prefix. Listed parts cover [start, prefix) without a gap, in
  dataset order, whatever the number of ranks; a restart begins at the prefix.
- Rows that take the place of error rows (`retry_failed`) make a new part: written, then listed instead of the
  old one, which is unlinked last.
- Rows of images that were replaced become error rows in the same way, with a reason of their own by which they are
  found and retried. The listing learns of the new images only then: a start after a crash before it finds them again.
- A reader may trust the manifest at any moment, and the whole folder once `status.json` says complete.

`predictions.npy` is one file allocated whole. Its windows are written in place and fsynced before they are
listed, so the same holds for the rows that the manifest lists. Rows that it lists as errors are left out of the
checksum (as NaN), so that writing over them in place is no risk either.

This relies on a file system that honours fsync, renames atomically and knows hard links, as local ones, NFS,
Lustre and GPFS do; object stores do not.
"""

import hashlib
import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from mgpu_ddp.errors import ProofError, UsageError, WriteError, cause_of
from mgpu_ddp.output.atomic_files import create_file, replace_file
from mgpu_ddp.output.columns import ColumnType, Ragged
from mgpu_ddp.output.formats import FORMATS, Format, empty_table, to_table
from mgpu_ddp.output.manifest import ARRAY, MANIFEST, PARTS, Manifest, Part, write_status
from mgpu_ddp.output.regular_files import map_array, open_regular
from mgpu_ddp.output.rows import Rows

CHANGED = "the image has changed since it was predicted: start the job again"
"""The reason of a row whose image is to be predicted again."""
KEPT = ("index", "path", "label", "error")
"""The columns of a row that say nothing of its prediction."""
COPIED_ROWS = 4096
"""Rows of an array that are copied at once, to bound memory."""

Integers = npt.NDArray[np.int64]
NamesOf = Callable[[npt.NDArray[np.int64]], Any]
"""Dataset indices → the names that their rows carry, an Arrow array of strings. A call for each would take the
interpreter from the predicting loop for longer than all else that is done here."""
CarriedOf = Callable[[Integers], dict[str, Any]]
"""Dataset indices → the columns that their source carries into the rows, as Arrow arrays."""


class PartWriter(Protocol):
    def write(self, rows: Rows) -> Part:
        """Make rows of one contiguous stretch durable; they count only once the manifest lists the part.

        Raises:
            WriteError: the file system refused.
        """
        ...

    def rewrite(self, part: Part, rows: Rows) -> Part:
        """Make the part durable with these rows in the place of its error rows; counts only once it is listed.

        Raises:
            ProofError: the part has other bytes than were committed.
            WriteError: the file system refused.
        """
        ...

    def blank(self, part: Part, chosen: Integers, types: Sequence[ColumnType]) -> Part:
        """Make the part durable with error rows for changed images; counts only once it is listed.

        `types` are those of the manifest's columns.

        Raises:
            ProofError: the part has other bytes than were committed.
            WriteError: the file system refused.
        """
        ...


class TableWriter:
    """Writes each part as a file of its own."""

    def __init__(
        self,
        run_dir: Path,
        how: Format,
        names_of: NamesOf,
        class_names: tuple[str, ...] | None,
        token: str,
        carried_of: CarriedOf,
    ) -> None:
        self._run_dir, self._format, self._token = run_dir, how, token
        self._names_of, self._class_names, self._carried_of = names_of, class_names, carried_of
        self._rewritten = 0

    def write(self, rows: Rows) -> Part:
        return self._create(self._table(rows), self._token, len(rows.split))

    def rewrite(self, part: Part, rows: Rows) -> Part:
        import pyarrow as pa
        from pyarrow import compute

        # What was damaged since must not get a checksum that says it is whole.
        check_bytes(self._run_dir, part)
        new = self._table(rows)
        old = self._format.read(self._run_dir / part.file, new.schema)
        kept = old.filter(compute.invert(compute.is_in(old["index"], value_set=new["index"])))
        self._rewritten += 1
        merged = pa.concat_tables([kept, new]).sort_by("index").combine_chunks()
        return self._create(merged, f"{self._token}-{self._rewritten}", part.split_rows + len(rows.split))

    def blank(self, part: Part, chosen: Integers, types: Sequence[ColumnType]) -> Part:
        import pyarrow as pa
        from pyarrow import compute

        check_bytes(self._run_dir, part)
        old = self._format.read(self._run_dir / part.file, empty_table(types).schema)
        hit = np.isin(old["index"].to_numpy(), chosen)
        kept = pa.array(np.arange(len(old)), mask=hit)
        stays = {*KEPT, *(each.name for each in types if each.arrow)}
        columns = {name: old[name] if name in stays else old[name].take(kept) for name in old.column_names}
        columns["error"] = compute.if_else(pa.array(hit), CHANGED, old["error"])
        self._rewritten += 1
        table = pa.table(columns, schema=old.schema).combine_chunks()
        return self._create(table, f"{self._token}-{self._rewritten}", part.split_rows)

    def _table(self, rows: Rows) -> Any:
        return to_table(rows, self._names_of(rows.index), self._class_names, self._carried_of(rows.index))

    def _create(self, table: Any, token: str, split_rows: int) -> Part:
        first = int(table["index"][0].as_py())
        name = f"{PARTS}/part-{first:012d}-{token}{self._format.suffix}"
        path = self._run_dir / name
        try:
            create_file(path, lambda file: self._format.write(table, file))
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            num_bytes = path.stat().st_size
        except OSError as error:
            raise write_error(path, error) from error
        return Part(
            file=name,
            first=first,
            rows=table.num_rows,
            errors=table.num_rows - table["error"].null_count,
            num_bytes=num_bytes,
            sha256=digest,
            split_rows=split_rows,
        )


class ArrayWriter:
    """Writes the one column into `predictions.npy`, float32 or float16 (samples, ...), NaN rows for errors."""

    def __init__(self, run_dir: Path, start: int) -> None:
        self._path, self._start = run_dir / ARRAY, start
        self._array = map_array(self._path, "r+")

    def write(self, rows: Rows) -> Part:
        self._put(rows)
        part = Part(
            file=ARRAY,
            first=int(rows.index[0]),
            rows=len(rows),
            errors=len(rows.errors),
            num_bytes=len(rows) * int(np.prod(self._array.shape[1:])) * self._array.itemsize,
            sha256="",
            split_rows=len(rows.split),
            reasons={str(i): reason for i, reason in rows.errors.items()},
        )
        return replace(part, sha256=array_digest(self._array, part, self._start))

    def rewrite(self, part: Part, rows: Rows) -> Part:
        check_bytes(self._path.parent, part, self._start)
        self._put(rows)
        retried = set(rows.index.tolist())
        kept = {i: reason for i, reason in part.reasons.items() if int(i) not in retried}
        reasons = kept | {str(i): reason for i, reason in rows.errors.items()}
        split_rows = part.split_rows + len(rows.split)
        part = replace(part, errors=len(reasons), reasons=reasons, split_rows=split_rows)
        return replace(part, sha256=array_digest(self._array, part, self._start))

    def blank(self, part: Part, chosen: Integers, types: Sequence[ColumnType]) -> Part:
        check_bytes(self._path.parent, part, self._start)
        reasons = part.reasons | {str(index): CHANGED for index in chosen.tolist()}
        part = replace(part, errors=len(reasons), reasons=reasons)
        return replace(part, sha256=array_digest(self._array, part, self._start))

    def _put(self, rows: Rows) -> None:
        # A classifier's pred and prob come before.
        *_, column = rows.columns.values()
        assert not isinstance(column, Ragged)
        values = column.astype(self._array.dtype, copy=True)
        values[rows.failed] = np.nan
        try:
            self._array[rows.index - self._start] = values
            self._array.flush()
        except OSError as error:
            raise write_error(self._path, error) from error


def check_bytes(run_dir: Path, part: Part, start: int = 0) -> None:
    """Compare a part with its checksum.

    Raises:
        ProofError: it has other bytes than were committed, or cannot be read.
    """
    path = run_dir / part.file
    try:
        if part.file == ARRAY:
            digest = array_digest(map_array(path), part, start)
        else:
            with open_regular(path) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise ProofError(f"{part.file} cannot be read ({cause_of(error)}). Delete it and start again.") from None
    if digest != part.sha256:
        raise ProofError(f"{part.file} has other bytes than were committed. Delete it and start again.")


def array_digest(array: npt.NDArray[np.floating], part: Part, start: int) -> str:
    """sha256 of a part's rows in the array, those that it lists as errors taken as NaN."""
    rows = np.array(array[part.first - start : part.stop - start])
    rows[[int(i) - part.first for i in part.reasons]] = np.nan
    return hashlib.sha256(rows.data).hexdigest()


def allocate_array(folder: Path, manifest: Manifest, shape: tuple[int, ...]) -> None:
    """Make `predictions.npy`, or a longer one that begins with the rows of the one that is there.

    Raises:
        UsageError: the one that is there has other columns.
    """
    path, rows = folder / ARRAY, manifest.stop - manifest.start
    dtype = np.dtype("<f2" if manifest.fingerprint.get("output.dtype") == "fp16" else "<f4")
    before = map_array(path) if path.exists() else None
    if before is not None and (before.shape[1:], before.dtype) != (shape, dtype):
        found = f"rows of {before.shape[1:]} {before.dtype} instead of {shape} {dtype}"
        raise UsageError(f"{path} has {found}. Delete it and start again.")
    # Rows are written in place, and a file with another name is somebody's copy as well.
    if before is not None and len(before) == rows and path.stat().st_nlink == 1:
        return

    def fill(file: BinaryIO) -> None:
        write_header(file, dtype, (rows, *shape))
        file.flush()
        if rows:
            # Claim the space now: a full disk should say so at the start.
            os.posix_fallocate(file.fileno(), file.tell(), rows * math.prod(shape) * dtype.itemsize)
        if before is not None:
            copy_rows(before, file)

    replace_file(path, fill)


def write_header(file: BinaryIO, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Begin a `.npy`: its rows follow."""
    np.lib.format.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": shape})


def copy_rows(array: npt.NDArray[np.floating], file: BinaryIO) -> None:
    """Append the rows of a mapped array, without taking memory for all of them."""
    for first in range(0, len(array), COPIED_ROWS):
        file.write(array[first : first + COPIED_ROWS].tobytes())


def blank_errors(folder: Path, manifest: Manifest) -> None:
    """Make error rows NaN again: a retry that was cut short may have left numbers that nobody listed."""
    failed = [int(index) - manifest.start for part in manifest.parts for index in part.reasons]
    if failed:
        array = map_array(folder / ARRAY, "r+")
        array[failed] = np.nan
        array.flush()


def write_error(path: Path, error: OSError) -> WriteError:
    return WriteError(
        f"{path} cannot be written ({error.strerror}). What was committed stays valid: make room and start again."
    )


def open_writer(
    run_dir: Path,
    how: str,
    names_of: NamesOf,
    class_names: tuple[str, ...] | None,
    token: str,
    start: int,
    carried_of: CarriedOf = lambda index: {},
) -> PartWriter:
    if how == "npy":
        return ArrayWriter(run_dir, start)
    import pyarrow as pa

    # Arrow's own pool would keep what the largest window once took, and memory is to stay flat.
    pa.set_memory_pool(pa.system_memory_pool())
    # The first table imports what would hold the GIL for a tenth of a second in the middle of the predicting loop.
    FORMATS[how].write(pa.table({"index": pa.array(np.empty(0, dtype=np.int64))}), io.BytesIO())
    return TableWriter(run_dir, FORMATS[how], names_of, class_names, token, carried_of)


class Table:
    """The parts that the manifest lists. Rank 0 only."""

    def __init__(self, run_dir: Path, manifest: Manifest, writer: PartWriter) -> None:
        self._run_dir, self._manifest, self._writer = run_dir, manifest, writer
        self.next_command: str | None = None
        """Continues the job that writes it."""

    def add(self, rows: Rows) -> None:
        """Write and list rows that follow the prefix.

        Raises:
            WriteError: the file system refused.
        """
        self.list([self._writer.write(rows)])

    def list(self, parts: list[Part]) -> None:
        """List parts that follow the prefix, in order.

        Raises:
            WriteError: a part is not there as described, or the manifest cannot be replaced.
            ProofError: the parts would leave a gap.
        """
        for part in parts:
            prefix = self._manifest.prefix
            if part.first != prefix:
                raise ProofError(
                    f"{part.file} begins at row {part.first}, but the table ends at row {prefix}. Start again."
                )
            if not part.has_its_size(self._run_dir):
                # Another job would have deleted what this one had not listed.
                self._check_claim()
                raise WriteError(
                    f"{self._run_dir / part.file} does not have the {part.num_bytes} bytes here that its rank wrote:"
                    " the ranks share no file system. Use output.collect=gather."
                )
            self._manifest.parts.append(part)
            self._manifest.count_work(part.rows)
        self._list_all()

    def replace_errors(self, rows: Rows) -> None:
        """Put rows, ascending, in the place of the error rows that listed parts hold for them.

        Raises:
            WriteError: the file system refused.
        """
        self._check_claim()
        self._reopen()

        def put(part: Part, within: Integers) -> Part:
            self._manifest.count_work(len(within))
            return self._writer.rewrite(part, rows.take(within))

        self._rewrite(rows.index, put)

    def blank(self, chosen: Integers) -> None:
        """Make error rows of those of changed images, ascending.

        Raises:
            WriteError: the file system refused.
        """
        types = [ColumnType.read(values) for values in self._manifest.columns]
        self._rewrite(chosen, lambda part, within: self._writer.blank(part, chosen[within], types))

    def _rewrite(self, index: Integers, rewrite: Callable[[Part, Integers], Part]) -> None:
        """Put each listed part that holds some of these rows anew; `rewrite` gets their places among them."""
        for number, part in enumerate(self._manifest.parts):
            within = np.flatnonzero((index >= part.first) & (index < part.stop))
            if not len(within):
                continue
            self._manifest.parts[number] = rewrite(part, within)
            self._list_all()
            if self._manifest.parts[number].file != part.file:
                (self._run_dir / part.file).unlink()

    def _reopen(self) -> None:
        """Say that a complete folder is not: it is about to hold some rows twice."""
        if not self._manifest.complete:
            return
        self._manifest.complete = False
        try:
            write_status(self._run_dir, "running", self._manifest, next_command=self.next_command)
        except OSError as error:
            raise write_error(self._run_dir, error) from error
        self._list_all()

    def _list_all(self) -> None:
        self._check_claim()
        try:
            self._manifest.write(self._run_dir)
        except OSError as error:
            raise write_error(self._run_dir / MANIFEST, error) from error

    def _check_claim(self) -> None:
        try:
            self._manifest.check_claim(self._run_dir)
        except OSError as error:
            raise write_error(self._run_dir / MANIFEST, error) from error


class RetriedTable(Table):
    """A table whose added rows take the place of error rows: row i is that of sample chosen[i]."""

    def __init__(self, run_dir: Path, manifest: Manifest, writer: PartWriter, chosen: npt.NDArray[np.int64]) -> None:
        super().__init__(run_dir, manifest, writer)
        self._chosen = chosen

    def add(self, rows: Rows) -> None:
        self.replace_errors(rows.renumbered(self._chosen))
