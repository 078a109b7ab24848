"""A new result takes the place of an older one (`overwrite=true`) only once it is complete.

Until then the job works in RUN/.next. Then the files of the old result move to RUN/.old, .next becomes .ready, and its
files move to RUN. Manifest and status leave first and come last: they speak of all the rest. Other files stay where
they are. Each step can be repeated, so a start that finds them half done completes them.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from mgpu_ddp.errors import StateError
from mgpu_ddp.output.atomic_files import add_folder, sync_folder
from mgpu_ddp.output.layout import NEXT, OLD, READY, check_unclaimed, remove_empty_folders, remove_result, result_in
from mgpu_ddp.output.manifest import MANIFEST, STATUS, Manifest


def is_half_replaced(run_dir: Path) -> bool:
    """Find out whether a new result is complete but not in its place."""
    if (run_dir / READY).exists():
        # Its manifest is there until it is at home.
        return any(Manifest.read(folder) is not None for folder in (run_dir / READY, run_dir))
    following = Manifest.read(run_dir / NEXT)
    return following is not None and following.complete


def put_in_place(run_dir: Path) -> None:
    """Replace the old result by the complete one in RUN/.next. Rank 0 only, while it holds the folder."""
    following, ready, old = run_dir / NEXT, run_dir / READY, run_dir / OLD
    if not ready.exists():
        if not (old / MANIFEST).exists():
            check_unclaimed(run_dir)
        old.mkdir(exist_ok=True)
        rest, marks = _split(result_in(run_dir))
        _move(marks[::-1], run_dir, old)
        _move(rest, run_dir, old)
        remove_empty_folders(run_dir)
        os.rename(following, ready)
        sync_folder(run_dir)
    rest, marks = _split(result_in(ready))
    _move(rest, ready, run_dir)
    _move(marks, ready, run_dir)
    if old.exists():
        remove_result(old)
        # While .ready is there, the next start ends this as well; a part of .old would be in the way of a later one.
        sync_folder(run_dir)
    remove_result(ready)


def _split(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files of a result, and its manifest and status."""
    marks = [name for name in names if name in (MANIFEST, STATUS)]
    return [name for name in names if name not in marks], marks


def _move(names: Sequence[str], source: Path, target: Path) -> None:
    """Move files durably; none takes the place of another."""
    folders = sorted({os.path.dirname(name) for name in names})
    for folder in folders:
        add_folder(target / folder)
    for name in names:
        if os.path.lexists(target / name):
            raise StateError(f"{target / name} is in the way of a new result. Move it away and start again.")
        os.rename(source / name, target / name)
    for folder in folders:
        sync_folder(source / folder)
        sync_folder(target / folder)
