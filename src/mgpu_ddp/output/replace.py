"""A new result takes the place of an older one (`overwrite=true`) only once it is complete.

Until then the job works in RUN/.next. Then the old result moves to RUN/.old, .next becomes .ready, and its
contents move to RUN. The status leaves first and comes last, and the manifest next to it: they speak of all the rest.
Each step can be repeated, so a start that finds them half done completes them.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from mgpu_ddp.data.listing import FILE_NAME
from mgpu_ddp.output.atomic_files import sync_folder
from mgpu_ddp.output.manifest import ARRAY, MANIFEST, PARTS, Manifest

NEXT, READY, OLD = ".next", ".ready", ".old"
RESULT = (
    PARTS,
    ARRAY,
    FILE_NAME,
    ".hydra",
    "logs",
    "errors.jsonl",
    "metrics.json",
    "classes.json",
    "report.html",
    MANIFEST,
    "status.json",
)
"""The files and folders of a result, in the order in which they move in; they move out in reverse."""


def holds_result(run_dir: Path) -> bool:
    return any((run_dir / name).exists() for name in (MANIFEST, PARTS, ARRAY))


def is_half_replaced(run_dir: Path) -> bool:
    """Find out whether a new result is complete but not in its place."""
    if (run_dir / READY).exists():
        return True
    following = Manifest.read(run_dir / NEXT)
    return following is not None and following.complete


def put_in_place(run_dir: Path) -> None:
    """Replace the old result by the complete one in RUN/.next. Rank 0 only, while it holds the folder."""
    following, ready, old = run_dir / NEXT, run_dir / READY, run_dir / OLD
    if not ready.exists():
        old.mkdir(exist_ok=True)
        _move(reversed(RESULT), run_dir, old)
        os.rename(following, ready)
        sync_folder(run_dir)
    _move(RESULT, ready, run_dir)
    if old.exists():
        shutil.rmtree(old)
        # While .ready is there, the next start ends this as well; a part of .old would be in the way of a later one.
        sync_folder(run_dir)
    shutil.rmtree(ready)


def _move(names: Iterable[str], source: Path, target: Path) -> None:
    for name in names:
        if (source / name).exists():
            os.rename(source / name, target / name)
    sync_folder(source)
    sync_folder(target)
