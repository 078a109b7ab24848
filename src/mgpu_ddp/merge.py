"""Shards → one run folder: `python -m mgpu_ddp.merge run=DIR`.

Each shard (`shard=i/n`) is a job of its own in a folder below DIR. Once all are complete, DIR becomes a run folder
like any other: its parts are the shards' own, under a second name, and the proof reads all of them.
"""

import itertools
import json
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mgpu_ddp.config.checks import require
from mgpu_ddp.config.schema import parse_shard
from mgpu_ddp.data.listing import FILE_NAME, Listing
from mgpu_ddp.errors import Exit, MgpuError, ProofError, StateError, UsageError
from mgpu_ddp.output.atomic_files import add_folder, replace_bytes, replace_file, replace_json, sync_folder
from mgpu_ddp.output.manifest import ARRAY, MANIFEST, PARTS, Manifest, write_status
from mgpu_ddp.output.run_folder import hold_folder
from mgpu_ddp.output.verify import prove
from mgpu_ddp.report import rebuild
from mgpu_ddp.reporting.class_table import CLASSES

COPIED_ROWS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A shard's folder and what it says of itself."""

    folder: Path
    manifest: Manifest
    number: int
    count: int


def main() -> None:
    """Merge the shards below a folder and print one JSON line."""
    try:
        print(json.dumps(merge(_folder_of(sys.argv[1:]))))
    except MgpuError as error:
        print(f"mgpu_ddp: {error}", file=sys.stderr)
        sys.exit(int(error.exit_code))
    except OSError as error:
        print(f"mgpu_ddp: run must be a writable folder, got: {error}", file=sys.stderr)
        sys.exit(int(Exit.FAILED))


def _folder_of(argv: list[str]) -> Path:
    key, _, value = argv[0].partition("=") if len(argv) == 1 else ("", "", "")
    require(key == "run" and bool(value), "run", "the folder of the shards", " ".join(argv), "Give run=DIR.")
    require(Path(value).is_dir(), "run", "a folder", value, "Name the folder that holds the shards.")
    return Path(value).absolute()


def merge(run_dir: Path) -> dict[str, Any]:
    """Prove that the shards are whole and make one run folder of them. Returns its summary.

    Raises:
        UsageError: shards are missing, unfinished or of different jobs.
        ProofError: a shard's folder does not hold what its manifest says.
    """
    shards = find_shards(run_dir)
    check_shards(run_dir, shards)
    how = str(shards[0].manifest.fingerprint["output.format"])
    for shard in shards:
        _check_proof(shard.folder, shard.manifest, how)
    held = hold_folder(run_dir)
    try:
        merged = _merge(run_dir, shards, how)
    finally:
        os.close(held)
    try:
        rebuild([f"run={run_dir}"])
    except (MgpuError, OSError) as error:
        # The table is proved: a page that cannot be made takes nothing from it.
        print(f"mgpu_ddp: no report.html: {error}", file=sys.stderr)
    return merged


def find_shards(run_dir: Path) -> list[Shard]:
    """The shards in the folders below a folder, by their number."""
    shards = []
    for path in sorted(run_dir.glob(f"*/{MANIFEST}")):
        manifest = Manifest.read(path.parent)
        if manifest is not None and manifest.shard is not None:
            number, count = parse_shard(manifest.shard)
            shards.append(Shard(folder=path.parent, manifest=manifest, number=number, count=count))
    return sorted(shards, key=lambda shard: shard.number)


def check_shards(run_dir: Path, shards: list[Shard]) -> None:
    """Refuse what is not one job, whole.

    Raises:
        UsageError: names the shard, and what to do.
    """
    require(bool(shards), "run", "a folder of shards", str(run_dir), "Start them with shard=i/n output.dir=DIR/...")
    first, count = shards[0], shards[0].count
    for shard in shards:
        rule = f"shards of one job, of which {first.folder.name} is {first.manifest.shard}"
        text = f"{shard.folder.name}, which is {shard.manifest.shard}"
        require(shard.count == count, "run", rule, text, "Keep those apart in another folder.")
        mine, theirs = _identity(shard), _identity(first)
        differing = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
        if differing:
            key = differing[0]
            shown = f"{key}={mine.get(key)!r} in {shard.folder.name}, {theirs.get(key)!r} in {first.folder.name}"
            raise UsageError(f"run must hold shards of one job, got {shown}. Run one of them again.")
    numbers = [shard.number for shard in shards]
    missing = sorted(set(range(count)) - set(numbers))
    doubled = sorted({number for number in numbers if numbers.count(number) > 1})
    require(not doubled, "run", "one folder for each shard", f"shard {doubled}", "Move the other one away.")
    remedy = f"Run shard={missing[0] if missing else 0}/{count}."
    require(not missing, "run", f"a folder of all {count} shards", f"none for {missing[:8]}", remedy)
    for shard in shards:
        manifest = shard.manifest
        left = manifest.stop - manifest.prefix
        text = f"{shard.folder.name} with {left} of {manifest.stop - manifest.start} rows left"
        remedy = f"Start it again with output.dir={shard.folder}."
        require(manifest.complete, "run", "a folder of complete shards", text, remedy)
    for before, after in itertools.pairwise(shards):
        text = f"{before.folder.name} up to {before.manifest.stop}, {after.folder.name} from {after.manifest.start}"
        ok = before.manifest.stop == after.manifest.start
        require(ok, "run", "shards of the same samples", text, "Run them again: their input has changed.")


def _identity(shard: Shard) -> dict[str, Any]:
    """What all shards of a job have in common."""
    identity = {key: value for key, value in shard.manifest.fingerprint.items() if key != "listing"}
    identity["batch_size"] = shard.manifest.batch_size
    if (shard.folder / FILE_NAME).exists():
        # The listing itself: the fingerprint speaks of its first rows alone, up to the shard's last.
        # Not its bytes: those of tars also say when each was changed.
        files = Listing.open(shard.folder / FILE_NAME)
        identity[FILE_NAME] = files.digest(len(files))
    else:
        identity["listing"] = shard.manifest.fingerprint.get("listing")
    return identity


def _check_proof(folder: Path, manifest: Manifest, how: str) -> None:
    proof = prove(folder, manifest, how)
    if (proof.rows, proof.missing, proof.duplicates) != (proof.total, 0, 0):
        raise ProofError(
            f"{folder} must hold each of {proof.total} samples once, got {proof.rows} rows, {proof.missing} missing,"
            f" {proof.duplicates} doubled."
        )


def _merge(run_dir: Path, shards: list[Shard], how: str) -> dict[str, Any]:
    first, last = shards[0].manifest, shards[-1].manifest
    if how == "npy":
        replace_file(run_dir / ARRAY, lambda file: _join_arrays(file, shards, last.stop - first.start))
    else:
        _link_parts(run_dir, shards)
    for name in (FILE_NAME, CLASSES):
        if (shards[0].folder / name).exists():
            _link(shards[0].folder / name, run_dir / name)
    merged = replace(
        last,
        start=first.start,
        parts=[part for shard in shards for part in shard.manifest.parts],
        world_sizes=sorted({size for shard in shards for size in shard.manifest.world_sizes}),
        shard=None,
    )
    replace_bytes(run_dir / "errors.jsonl", b"".join((s.folder / "errors.jsonl").read_bytes() for s in shards))
    _check_proof(run_dir, merged, how)
    rates = [_metrics(shard.folder).get("images_per_s", 0.0) for shard in shards]
    replace_json(run_dir / "metrics.json", {"shards": len(shards), "images_per_s_of_each": rates})
    merged.write(run_dir)
    write_status(run_dir, "complete", merged)
    rows = merged.stop - merged.start
    return {
        "status": "complete",
        "shards": len(shards),
        "samples": rows,
        "rows": rows,
        "ok": rows - merged.errors,
        "errors": merged.errors,
        "missing": 0,
        "duplicates": 0,
        "run_dir": str(run_dir),
    }


def _link_parts(run_dir: Path, shards: list[Shard]) -> None:
    add_folder(run_dir / PARTS)
    listed = {Path(part.file).name for shard in shards for part in shard.manifest.parts}
    for path in (run_dir / PARTS).iterdir():
        # Of a merge before, of shards that were run again since.
        if path.name not in listed:
            path.unlink()
    for shard in shards:
        for part in shard.manifest.parts:
            _link(shard.folder / part.file, run_dir / part.file)
    sync_folder(run_dir / PARTS)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name; a copy where the file system has none for it."""
    if target.exists() and target.samefile(source):
        return
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        with source.open("rb") as file:
            replace_file(target, lambda copy: shutil.copyfileobj(file, copy))


def _join_arrays(file: BinaryIO, shards: list[Shard], rows: int) -> None:
    arrays = [np.load(shard.folder / ARRAY, mmap_mode="r") for shard in shards]
    if len({(array.shape[1], array.dtype) for array in arrays}) > 1:
        raise StateError(f"{ARRAY} must have the same columns in all shards.")
    header = {"descr": arrays[0].dtype.str, "fortran_order": False, "shape": (rows, arrays[0].shape[1])}
    np.lib.format.write_array_header_1_0(file, header)
    for array in arrays:
        for start in range(0, len(array), COPIED_ROWS):
            file.write(array[start : start + COPIED_ROWS].tobytes())


def _metrics(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "metrics.json").read_text()))
    except (OSError, ValueError):
        return {}


if __name__ == "__main__":
    main()
