"""The run folder: parts, the manifest, and how a crash at any moment leaves them.

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
import json
import os
import platform
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mgpu_ddp import __version__
from mgpu_ddp.datasets import Samples
from mgpu_ddp.errors import ProofError, UsageError, WriteError
from mgpu_ddp.formats import FORMATS, Format, to_table
from mgpu_ddp.rows import Rows

MANIFEST = "manifest.json"
PARTS = "predictions"
ARRAY = "predictions.npy"


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A durable stretch [first, first + rows) of the dataset, as the manifest lists it."""

    file: str
    """Relative to the run folder."""
    first: int
    rows: int
    errors: int
    num_bytes: int
    sha256: str
    reasons: dict[str, str] = field(default_factory=dict)
    """index → reason, for a format that has no place for reasons."""

    @property
    def stop(self) -> int:
        return self.first + self.rows


@dataclass(kw_only=True, slots=True)
class Manifest:
    """What is done, and what the job is."""

    fingerprint: dict[str, Any]
    """The keys that decide the rows, resolved: another value is another job."""
    start: int
    stop: int
    batch_size: int
    parts: list[Part] = field(default_factory=list)
    world_sizes: list[int] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    complete: bool = False

    @property
    def prefix(self) -> int:
        """The first index that is not committed."""
        return self.parts[-1].stop if self.parts else self.start

    @property
    def errors(self) -> int:
        return sum(part.errors for part in self.parts)

    @classmethod
    def read(cls, run_dir: Path) -> "Manifest | None":
        """The manifest of a folder, None where there is none.

        Raises:
            UsageError: the file is not a manifest of ours.
        """
        path = run_dir / MANIFEST
        try:
            raw = json.loads(path.read_text())
            return cls(**{**raw, "parts": [Part(**part) for part in raw["parts"]]})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(
                f"{path} must be a readable manifest, got {type(error).__name__}. Choose another output.dir."
            ) from None

    def write(self, run_dir: Path) -> None:
        write_json(run_dir / MANIFEST, asdict(self))


def write_json(path: Path, value: Any) -> None:
    """Replace a small file durably: its old or its new content is there at any moment, never a mixture."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def write_bytes(path: Path, data: Any) -> None:
    """Replace a file durably by the bytes of a buffer."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
            _sync_folder(path.parent)
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
    return TableWriter(run_dir, FORMATS[how], samples, class_names, token)


def claim_folder(
    run_dir: Path,
    wanted: Manifest,
    *,
    resume: bool,
    overwrite: bool,
    batch_size_given: bool,
    array_columns: int | None,
) -> Manifest:
    """Make the folder this job's: new, continued or refused. Rank 0 only, before any rank writes.

    `wanted` is the manifest of a fresh start; the manifest that holds from now on comes back. `array_columns` is
    the number of classes where the output is one array.

    Raises:
        UsageError: the folder holds another job, or cannot be written to.
    """
    found = Manifest.read(run_dir)
    if found is None and not overwrite and any((run_dir / name).exists() for name in (PARTS, ARRAY)):
        raise UsageError(
            f"output.dir must be empty or hold this job, got {str(run_dir)!r} with foreign predictions. Choose another."
        )
    if found is not None and not overwrite:
        _refuse_another_job(run_dir, found, wanted, resume)
        if not batch_size_given or found.complete:
            wanted.batch_size = found.batch_size
        wanted.parts = list(_whole_parts(run_dir, found.parts))
        wanted.complete = found.complete and wanted.prefix == wanted.stop
        wanted.world_sizes = list(dict.fromkeys([*found.world_sizes, *wanted.world_sizes]))
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        wanted.write(run_dir)
        _remove_unlisted(run_dir, wanted)
        if array_columns is None:
            (run_dir / PARTS).mkdir(exist_ok=True)
        else:
            _allocate_array(run_dir, wanted, array_columns)
    except OSError as error:
        raise UsageError(
            f"output.dir must be a writable folder, got {str(run_dir)!r} ({error.strerror}). Choose another."
        ) from None
    return wanted


def _refuse_another_job(run_dir: Path, found: Manifest, wanted: Manifest, resume: bool) -> None:
    if not resume:
        raise UsageError(
            f"output.dir must be empty with resume=false, got {str(run_dir)!r}. Set overwrite=true or choose another."
        )
    mine = {**wanted.fingerprint, "samples": [wanted.start, wanted.stop]}
    theirs = {**found.fingerprint, "samples": [found.start, found.stop]}
    differing = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
    if differing:
        shown = "; ".join(f"{key}={theirs.get(key)!r} there, {mine.get(key)!r} here" for key in differing[:4])
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise UsageError(
            f"output.dir must hold this same job, got {str(run_dir)!r} with {shown}{more}."
            " Choose another or set overwrite=true."
        )


def _whole_parts(run_dir: Path, parts: Iterable[Part]) -> Iterator[Part]:
    """The leading parts that are still as they were written; the rest is predicted again."""
    for part in parts:
        path = run_dir / part.file
        if not path.is_file() or not _has_its_size(path, part):
            return
        yield part


def _has_its_size(path: Path, part: Part) -> bool:
    if part.file != ARRAY:
        return path.stat().st_size == part.num_bytes
    try:
        np.load(path, mmap_mode="r")
    except ValueError:
        return False
    return True


def _remove_unlisted(run_dir: Path, manifest: Manifest) -> None:
    listed = {part.file for part in manifest.parts}
    if (run_dir / PARTS).is_dir():
        for path in (run_dir / PARTS).iterdir():
            if f"{PARTS}/{path.name}" not in listed:
                path.unlink()
    if ARRAY not in listed:
        (run_dir / ARRAY).unlink(missing_ok=True)


def _allocate_array(run_dir: Path, manifest: Manifest, num_classes: int) -> None:
    path = run_dir / ARRAY
    if path.exists():
        return
    shape = (manifest.stop - manifest.start, num_classes)
    temporary = path.with_name(f".{ARRAY}.tmp")
    with temporary.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        if shape[0]:
            # Claim the space now: a full disk should say so at the start.
            os.posix_fallocate(file.fileno(), file.tell(), shape[0] * shape[1] * 4)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    _sync_folder(run_dir)


def commit(run_dir: Path, manifest: Manifest, parts: list[Part]) -> None:
    """List parts that follow the prefix, in order. Rank 0 only.

    Raises:
        WriteError: a part is not there as described, or the manifest cannot be replaced.
        ProofError: the parts would leave a gap.
    """
    for part in parts:
        if part.first != manifest.prefix:
            raise ProofError(f"part {part.file} must begin at {manifest.prefix}, got {part.first}.")
        path = run_dir / part.file
        if not path.is_file() or not _has_its_size(path, part):
            raise WriteError(
                f"{run_dir / part.file} must hold {part.num_bytes} bytes for every rank. Use output.collect=gather."
            )
        manifest.parts.append(part)
    try:
        manifest.write(run_dir)
    except OSError as error:
        raise _write_error(run_dir / MANIFEST, error) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """What the folder was found to hold."""

    total: int
    rows: int
    errors: int
    missing: int
    duplicates: int


def prove(run_dir: Path, manifest: Manifest, how: str) -> Proof:
    """Read back what is on disk and count: rows == samples, none missing, none doubled. Rank 0 only.

    Raises:
        ProofError: the folder and the manifest disagree.
    """
    listed = {part.file for part in manifest.parts}
    if how == "npy":
        shape = np.load(run_dir / ARRAY, mmap_mode="r").shape
        if shape[0] != manifest.stop - manifest.start:
            raise ProofError(f"{ARRAY} must have {manifest.stop - manifest.start} rows, got {shape[0]}.")
    else:
        found = {f"{PARTS}/{path.name}" for path in (run_dir / PARTS).iterdir()}
        if found != listed:
            raise ProofError(
                f"{PARTS}/ must hold the parts of the manifest, got {sorted(found ^ listed)[:3]} on one side only."
            )
    for part in manifest.parts:
        if _digest(run_dir, part, manifest.start) != part.sha256:
            raise ProofError(f"{part.file} must hold what was committed, got other bytes. Delete it and start again.")
    total, rows, next_index = manifest.stop - manifest.start, 0, manifest.start
    in_order = True
    for part in manifest.parts:
        index = _index_of(run_dir, part, how)
        in_order = in_order and np.array_equal(index, np.arange(next_index, next_index + part.rows))
        rows, next_index = rows + len(index), part.stop
    missing, duplicates = manifest.stop - next_index, 0
    if not in_order:
        missing, duplicates = _count(run_dir, manifest, how)
    return Proof(total=total, rows=rows, errors=manifest.errors, missing=missing, duplicates=duplicates)


def _count(run_dir: Path, manifest: Manifest, how: str) -> tuple[int, int]:
    """(missing, doubled) rows of a table that is known to be wrong; takes memory for every sample."""
    index = np.concatenate([_index_of(run_dir, part, how) for part in manifest.parts])
    found, times = np.unique(index, return_counts=True)
    expected = np.arange(manifest.start, manifest.stop)
    return len(np.setdiff1d(expected, found)), int((times - 1).sum())


def _digest(run_dir: Path, part: Part, start: int) -> str:
    if part.file == ARRAY:
        rows = np.load(run_dir / ARRAY, mmap_mode="r")[part.first - start : part.stop - start]
        return hashlib.sha256(np.ascontiguousarray(rows).data).hexdigest()
    with (run_dir / part.file).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _index_of(run_dir: Path, part: Part, how: str) -> Any:
    if how == "npy":
        return np.arange(part.first, part.stop)
    return FORMATS[how].columns(run_dir / part.file, ["index"])["index"].to_numpy()


def write_errors(run_dir: Path, manifest: Manifest, how: str, samples: Samples) -> None:
    """Derive `errors.jsonl` (index, path, reason) from the parts. Rank 0 only."""
    lines: list[bytes] = []
    for part in manifest.parts:
        if part.errors == 0:
            continue
        if how == "npy":
            found = [(int(i), samples.path(int(i)), reason) for i, reason in part.reasons.items()]
        else:
            table = FORMATS[how].columns(run_dir / part.file, ["index", "path", "error"]).to_pylist()
            found = [(row["index"], row["path"], row["error"]) for row in table if row["error"]]
        for index, path, reason in found:
            record = {"index": index, "path": path, "reason": reason}
            lines.append(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    write_bytes(run_dir / "errors.jsonl", b"".join(lines))


def write_status(run_dir: Path, status: str, manifest: Manifest, reason: str | None = None) -> None:
    """Write `status.json`: running, complete, failed or preempted, with counts. Rank 0 only."""
    total, rows = manifest.stop - manifest.start, manifest.prefix - manifest.start
    counts = {"total": total, "ok": rows - manifest.errors, "error": manifest.errors, "missing": total - rows}
    write_json(run_dir / "status.json", {"status": status, "reason": reason, "counts": counts})


def versions() -> dict[str, str]:
    import pyarrow
    import torch
    import torchvision

    return {
        "mgpu_ddp": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "pyarrow": pyarrow.__version__,
    }
