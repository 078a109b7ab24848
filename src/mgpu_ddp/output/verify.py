"""The final proof: read back what is on disk and count."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mgpu_ddp.errors import ProofError, cause_of, plural
from mgpu_ddp.output.atomic_files import replace_bytes
from mgpu_ddp.output.formats import FORMATS
from mgpu_ddp.output.layout import entries_in
from mgpu_ddp.output.manifest import ARRAY, MANIFEST, PARTS, TABLES, Manifest, Part
from mgpu_ddp.output.parts import check_bytes
from mgpu_ddp.output.regular_files import map_array


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """Counts of the rows that a folder was found to hold."""

    total: int
    rows: int
    errors: int
    missing: int
    duplicates: int

    def check_exact(self, where: str) -> None:
        """Require one row for every sample.

        Raises:
            ProofError: rows are missing or there twice; the message begins with `where`.
        """
        if (self.rows, self.missing, self.duplicates) != (self.total, 0, 0):
            raise ProofError(
                f"{where} does not hold each of {self.total} samples once: {plural(self.rows, 'row')},"
                f" {self.missing} missing, {self.duplicates} duplicates. Start again with overwrite=true."
            )


def prove(run_dir: Path, manifest: Manifest) -> Proof:
    """Read back what is on disk and count: rows == samples, none missing, no duplicates. Rank 0 only.

    Raises:
        ProofError: the folder and the manifest disagree.
    """
    listed = {part.file for part in manifest.parts}
    if manifest.output_format == "npy":
        rows = _rows_of_array(run_dir)
        if rows != manifest.stop - manifest.start:
            raise ProofError(
                f"{ARRAY} has {plural(rows, 'row')} instead of {manifest.stop - manifest.start}."
                " Delete it and start again."
            )
    else:
        # What a reader would take for rows; other files are nobody's business.
        found = {name for name, _ in entries_in(run_dir) if name.startswith(f"{PARTS}/") and name.endswith(TABLES)}
        if found != listed:
            raise ProofError(f"{PARTS}/ and {MANIFEST} differ in {sorted(found ^ listed)[:3]}. Start the job again.")
    for part in manifest.parts:
        check_bytes(run_dir, part, manifest.start)
    total, rows, next_index = manifest.stop - manifest.start, 0, manifest.start
    in_order = True
    for part in manifest.parts:
        index, errors = _read_rows(run_dir, manifest, part)
        in_order = in_order and np.array_equal(index, np.arange(next_index, next_index + part.rows))
        if in_order and errors != part.errors:
            raise ProofError(
                f"{part.file} holds {plural(errors, 'error row')}, but {MANIFEST} says {part.errors}."
                " Delete it and start again."
            )
        rows, next_index = rows + len(index), part.stop
    missing, duplicates = manifest.stop - next_index, 0
    if not in_order:
        missing, duplicates = _count(run_dir, manifest)
    return Proof(total=total, rows=rows, errors=manifest.errors, missing=missing, duplicates=duplicates)


def _rows_of_array(run_dir: Path) -> int:
    try:
        return len(map_array(run_dir / ARRAY))
    except (OSError, ValueError) as error:
        raise ProofError(f"{ARRAY} cannot be read ({cause_of(error)}). Delete it and start again.") from None


def _count(run_dir: Path, manifest: Manifest) -> tuple[int, int]:
    """(missing, duplicate) rows of a table that is known to be wrong; takes memory for every sample."""
    index = np.concatenate([_read_rows(run_dir, manifest, part)[0] for part in manifest.parts])
    found, times = np.unique(index, return_counts=True)
    expected = np.arange(manifest.start, manifest.stop)
    return len(np.setdiff1d(expected, found)), int((times - 1).sum())


def _read_rows(run_dir: Path, manifest: Manifest, part: Part) -> tuple[Any, int]:
    """The indices of a part's rows, and how many of them are errors."""
    if manifest.output_format == "npy":
        return np.arange(part.first, part.stop), len(part.reasons)
    table = read_columns(run_dir, manifest, part, ["index", "error"])
    return table["index"].to_numpy(), len(table) - table["error"].null_count


def read_columns(run_dir: Path, manifest: Manifest, part: Part, names: list[str]) -> Any:
    """Columns of a part that is a table of its own.

    Raises:
        ProofError: the part does not hold them.
    """
    try:
        return FORMATS[manifest.output_format].columns(run_dir / part.file, names)
    except Exception as error:
        raise ProofError(f"{part.file} cannot be read ({cause_of(error)}). Delete it and start again.") from error


def write_errors(run_dir: Path, manifest: Manifest, path_of: Callable[[int], str | None]) -> None:
    """Derive `errors.jsonl` (index, path, reason) from the parts. Rank 0 only."""
    lines: list[bytes] = []
    for index, path, reason in error_rows(run_dir, manifest, path_of):
        record = {"index": index, "path": path, "reason": reason}
        lines.append(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    replace_bytes(run_dir / "errors.jsonl", b"".join(lines))


def error_rows(
    run_dir: Path, manifest: Manifest, path_of: Callable[[int], str | None]
) -> Iterator[tuple[int, str | None, str]]:
    """(index, path, reason) of every error row, ascending, read from the parts. Rank 0 only."""
    for part in manifest.parts:
        if part.errors == 0:
            continue
        if manifest.output_format == "npy":
            yield from sorted((int(i), path_of(int(i)), reason) for i, reason in part.reasons.items())
        else:
            table = read_columns(run_dir, manifest, part, ["index", "path", "error"]).to_pylist()
            yield from ((row["index"], row["path"], row["error"]) for row in table if row["error"])
