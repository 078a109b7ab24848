"""Shards → one run folder: `python -m mgpu_ddp.merge run=DIR`.

Each shard (`shard=i/n`) is a job of its own in a folder below DIR. Once all are complete, DIR becomes a run folder
like any other: its parts are hard links to the shards' own, and the proof reads all of them.
"""

import itertools
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from mgpu_ddp.config.schema import parse_shard
from mgpu_ddp.data.listing import FILE_NAME, Listing, readable
from mgpu_ddp.errors import MgpuError, StateError, UsageError
from mgpu_ddp.output.atomic_files import add_folder, replace_file, replace_json, sync_folder
from mgpu_ddp.output.folders import holding
from mgpu_ddp.output.layout import check_layout, check_unclaimed
from mgpu_ddp.output.manifest import ARRAY, MANIFEST, PARTS, Manifest, write_status
from mgpu_ddp.output.parts import copy_rows, write_header
from mgpu_ddp.output.regular_files import map_array, open_regular, read_json
from mgpu_ddp.output.run_folder import remove_unlisted
from mgpu_ddp.output.verify import prove, write_errors
from mgpu_ddp.report import rebuild, run_command
from mgpu_ddp.reporting.class_table import CLASSES
from mgpu_ddp.reporting.terminal import print_mistake

HELP = """\
Merge the shards of a job into one run folder.

  python -m mgpu_ddp.merge run=DIR

DIR holds a folder for each shard, as jobs with shard=0/n to shard=n-1/n and output.dir=DIR/... have left them. All must
be complete. DIR itself becomes a run folder like any other: its parts are hard links, or copies where those cannot be,
and every part is read and proved. The shards stay as they are. The last line on stdout is JSON.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A shard's folder and its manifest; shard=`number`/`count`."""

    folder: Path
    manifest: Manifest
    number: int
    count: int


def main() -> None:
    """Merge the shards below a folder and print one JSON line."""
    run_command(merge, HELP)


def merge(run_dir: Path) -> dict[str, Any]:
    """Prove that the shards are whole and merge them into one run folder. Returns its summary.

    Raises:
        UsageError: shards are missing, unfinished or of different jobs, or the folder holds something else.
        ProofError: a shard's folder does not hold what its manifest says.
    """
    check_layout(run_dir)
    shards = find_shards(run_dir)
    check_shards(run_dir, shards)
    _check_target(run_dir, shards[0])
    for shard in shards:
        prove(shard.folder, shard.manifest).check_exact(str(shard.folder))
    with holding(run_dir):
        merged = _merge(run_dir, shards)
    try:
        rebuild(run_dir)
    except (MgpuError, OSError) as error:
        # The table is proved by now.
        print_mistake(f"report.html was not written: {error}")
    return merged


def find_shards(run_dir: Path) -> list[Shard]:
    """Find the shards in the folders below a folder, in order."""
    shards = []
    for path in sorted(run_dir.glob(f"*/{MANIFEST}")):
        check_layout(path.parent)
        manifest = Manifest.read(path.parent)
        if manifest is not None and manifest.shard is not None:
            number, count = parse_shard(manifest.shard)
            shards.append(Shard(folder=path.parent, manifest=manifest, number=number, count=count))
    return sorted(shards, key=lambda shard: shard.number)


def check_shards(run_dir: Path, shards: list[Shard]) -> None:
    """Check that these are all shards of one job, each complete.

    Raises:
        UsageError: they are not. It names the shard, and what to do.
    """
    if not shards:
        raise UsageError(f"{run_dir} has no shards below it. Start them with shard=i/n output.dir=DIR/...")
    _check_same_job(shards)
    _check_all_there(run_dir, shards)
    for shard in shards:
        left, total = shard.manifest.stop - shard.manifest.prefix, shard.manifest.stop - shard.manifest.start
        if not shard.manifest.complete:
            remedy = f"Start it again with output.dir={shard.folder}."
            raise UsageError(f"{shard.folder.name} is not complete: {left} of its {total} rows are left. {remedy}")
    for before, after in itertools.pairwise(shards):
        stop, start = before.manifest.stop, after.manifest.start
        if stop != start:
            where = f"{before.folder.name} ends at row {stop} and {after.folder.name} begins at row {start}"
            raise UsageError(f"{where}: their input has changed in between. Run them again.")


def _check_same_job(shards: list[Shard]) -> None:
    first, expected = shards[0], _identity(shards[0])
    for shard in shards:
        names = shard.folder.name, first.folder.name
        if shard.count != first.count:
            numbers = f"{names[0]} is shard {shard.manifest.shard}, but {names[1]} is {first.manifest.shard}"
            raise UsageError(f"{numbers}. Move the shards of another job to another folder.")
        found = _identity(shard)
        for key in sorted(found.keys() | expected.keys()):
            if found.get(key) != expected.get(key):
                values = f"{key}={found.get(key)!r} in {names[0]}, {expected.get(key)!r} in {names[1]}"
                raise UsageError(f"these are shards of different jobs: {values}. Run one of them again.")


def _check_all_there(run_dir: Path, shards: list[Shard]) -> None:
    count, numbers = shards[0].count, [shard.number for shard in shards]
    for before, after in itertools.pairwise(shards):
        if before.number == after.number:
            where = f"{before.folder.name} and {after.folder.name}"
            raise UsageError(f"shard {before.number}/{count} is there twice, in {where}. Move one of them away.")
    missing = sorted(set(range(count)) - set(numbers))
    if missing:
        raise UsageError(f"{run_dir} lacks {len(missing)} of its {count} shards. Run shard={missing[0]}/{count}.")


def _check_target(run_dir: Path, shard: Shard) -> None:
    """Check that the folder holds nothing yet, or what an earlier merge of this job has left.

    Raises:
        UsageError: it holds something else.
    """
    check_unclaimed(run_dir)
    found = Manifest.read(run_dir)
    if found is not None:
        theirs, mine = ({**each.fingerprint, "listing": None} for each in (found, shard.manifest))
        if theirs != mine:
            raise UsageError(f"{run_dir} holds another job than its shards. Move them to another folder.")


def _identity(shard: Shard) -> dict[str, Any]:
    """Keys and values that all shards of a job have in common."""
    identity = {key: value for key, value in shard.manifest.fingerprint.items() if key != "listing"}
    identity |= {"batch_size": shard.manifest.batch_size, "columns": shard.manifest.columns}
    if (shard.folder / FILE_NAME).exists():
        # The listing itself, because the fingerprint covers its rows only up to the shard's last. By its digest,
        # because its bytes also hold when each tar was changed.
        files = Listing.open(shard.folder / FILE_NAME)
        identity[FILE_NAME] = files.digest(len(files))
    else:
        identity["listing"] = shard.manifest.fingerprint.get("listing")
    return identity


def _merge(run_dir: Path, shards: list[Shard]) -> dict[str, Any]:
    first, last = shards[0].manifest, shards[-1].manifest
    merged = replace(
        last,
        start=first.start,
        parts=[part for shard in shards for part in shard.manifest.parts],
        world_sizes=sorted({size for shard in shards for size in shard.manifest.world_sizes}),
        shard=None,
        # Shards run at the same time: their seconds do not add up.
        starts=[],
        token=secrets.token_hex(3),
    )
    if (run_dir / MANIFEST).exists():
        # What an earlier merge has left may be trusted no longer.
        write_status(run_dir, "running", merged)
    # A merge that is cut short leaves a folder that is ours, and can be repeated.
    replace(merged, parts=[], complete=False).write(run_dir)
    if first.output_format == "npy":
        replace_file(run_dir / ARRAY, lambda file: _join_arrays(file, shards, last.stop - first.start))
    else:
        _link_parts(run_dir, shards, merged)
    for name in (FILE_NAME, CLASSES):
        if (shards[0].folder / name).exists():
            _link(shards[0].folder / name, run_dir / name)
    prove(run_dir, merged).check_exact(str(run_dir))
    write_errors(run_dir, merged, _path_of(run_dir))
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
        "weights": merged.weights,
        "run_dir": str(run_dir),
    }


def _link_parts(run_dir: Path, shards: list[Shard], merged: Manifest) -> None:
    add_folder(run_dir / PARTS)
    # What an earlier merge has left, from shards that were run again since.
    remove_unlisted(run_dir, merged)
    for shard in shards:
        for part in shard.manifest.parts:
            _link(shard.folder / part.file, run_dir / part.file)
    sync_folder(run_dir / PARTS)


def _link(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file system has no links."""
    if target.exists() and target.samefile(source):
        return
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        with open_regular(source) as file:
            replace_file(target, lambda copy: shutil.copyfileobj(file, copy))


def _join_arrays(file: BinaryIO, shards: list[Shard], rows: int) -> None:
    arrays = [map_array(shard.folder / ARRAY) for shard in shards]
    if len({(array.shape[1:], array.dtype) for array in arrays}) > 1:
        raise StateError(f"{ARRAY} differs between the shards in its columns or dtype. Run the shards again.")
    write_header(file, arrays[0].dtype, (rows, *arrays[0].shape[1:]))
    for array in arrays:
        copy_rows(array, file)


def _path_of(run_dir: Path) -> Callable[[int], str | None]:
    if not (run_dir / FILE_NAME).exists():
        return lambda index: None
    listing = Listing.open(run_dir / FILE_NAME)
    return lambda index: readable(listing.path(index))


def _metrics(folder: Path) -> dict[str, Any]:
    try:
        return dict(read_json(folder / "metrics.json"))
    except (OSError, ValueError, TypeError):
        return {}


if __name__ == "__main__":
    main()
