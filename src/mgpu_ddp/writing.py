"""Rows become durable parts, and how a crash at any moment leaves the run folder.

The commit protocol
-------------------
A part is written to a hidden temporary file beside its place, flushed and fsynced, renamed into place, and the
folder is fsynced. Then, and only then, rank 0 lists it in `manifest.json`, which is replaced the same way. So:

- A part that the manifest lists is durable and whole. Its entry carries row count, size and sha256, so that a
  torn or foreign file cannot pass for it.
- A file that the manifest does not list counts for nothing. Whoever starts next deletes it before any rank
  writes. Its name carries the token of the attempt that wrote it, so a writer of a dead attempt that wakes up
  late can never replace a part of a living one.
- What is done is one number: the committed prefix. Listed parts cover [start, prefix) without a gap, in
  dataset order, whatever the number of ranks; a restart begins at the prefix.
- A reader may trust the manifest at any moment, and the whole folder once `status.json` says complete.

`predictions.npy` is one file allocated whole. Its windows are written in place and fsynced before they are
listed, so the same holds for the rows that the manifest lists.
"""

import hashlib
import os
from pathlib import Path
from typing import Protocol

import numpy as np

from mgpu_ddp.datasets import Samples
from mgpu_ddp.errors import ProofError, WriteError
from mgpu_ddp.formats import FORMATS, Format, to_table
from mgpu_ddp.manifest import ARRAY, MANIFEST, PARTS, Manifest, Part, sync_folder
from mgpu_ddp.rows import Rows


class PartWriter(Protocol):
    def write(self, rows: Rows) -> Part:
        """Make rows of one contiguous stretch durable; they count only once the manifest lists the part.

        Raises:
            WriteError: the file system refused.
        """
        ...


class TableWriter:
    """Writes each part as a file of its own."""

    def __init__(
        self, run_dir: Path, how: Format, samples: Samples, class_names: tuple[str, ...] | None, token: str
    ) -> None:
        self._run_dir, self._format, self._token = run_dir, how, token
        self._samples, self._class_names = samples, class_names

    def write(self, rows: Rows) -> Part:
        first = int(rows.index[0])
        name = f"{PARTS}/part-{first:012d}-{self._token}{self._format.suffix}"
        path = self._run_dir / name
        temporary = path.with_name(f".{path.name}.tmp")
        table = to_table(rows, [self._samples.path(i) for i in rows.index.tolist()], self._class_names)
        try:
            with temporary.open("wb") as file:
                self._format.write(table, file)
                file.flush()
                os.fsync(file.fileno())
            with temporary.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            num_bytes = temporary.stat().st_size
            temporary.rename(path)
            sync_folder(path.parent)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise _write_error(path, error) from error
        return Part(
            file=name,
            first=first,
            rows=len(rows),
            errors=len(rows.errors),
            num_bytes=num_bytes,
            sha256=digest,
        )


class ArrayWriter:
    """Writes logits into `predictions.npy`, float32 (samples, classes), NaN rows for errors."""

    def __init__(self, run_dir: Path, start: int) -> None:
        self._path, self._start = run_dir / ARRAY, start
        self._array = np.load(self._path, mmap_mode="r+")

    def write(self, rows: Rows) -> Part:
        first = int(rows.index[0])
        place = slice(first - self._start, first - self._start + len(rows))
        logits = rows.columns["logits"].astype(np.float32, copy=True)
        logits[rows.failed] = np.nan
        try:
            self._array[place] = logits
            self._array.flush()
        except OSError as error:
            raise _write_error(self._path, error) from error
        return Part(
            file=ARRAY,
            first=first,
            rows=len(rows),
            errors=len(rows.errors),
            num_bytes=logits.nbytes,
            sha256=hashlib.sha256(logits.data).hexdigest(),
            reasons={str(i): reason for i, reason in rows.errors.items()},
        )


def _write_error(path: Path, error: OSError) -> WriteError:
    return WriteError(
        f"{path} must be writable, got {error.strerror}. What was committed stays valid; make room and start again."
    )


def open_writer(
    run_dir: Path, how: str, samples: Samples, class_names: tuple[str, ...] | None, token: str, start: int
) -> PartWriter:
    if how == "npy":
        return ArrayWriter(run_dir, start)
    import pyarrow as pa

    # Arrow's own pool would keep what the largest window once took, and memory is to stay flat.
    pa.set_memory_pool(pa.system_memory_pool())
    return TableWriter(run_dir, FORMATS[how], samples, class_names, token)


def commit(run_dir: Path, manifest: Manifest, parts: list[Part]) -> None:
    """List parts that follow the prefix, in order. Rank 0 only.

    Raises:
        WriteError: a part is not there as described, or the manifest cannot be replaced.
        ProofError: the parts would leave a gap.
    """
    for part in parts:
        if part.first != manifest.prefix:
            raise ProofError(f"part {part.file} must begin at {manifest.prefix}, got {part.first}.")
        if not part.has_its_size(run_dir):
            raise WriteError(
                f"{run_dir / part.file} must hold {part.num_bytes} bytes for every rank. Use output.collect=gather."
            )
        manifest.parts.append(part)
    try:
        manifest.write(run_dir)
    except OSError as error:
        raise _write_error(run_dir / MANIFEST, error) from error
