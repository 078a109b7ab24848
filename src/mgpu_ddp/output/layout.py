"""The layout of a run folder: the names that are ours, and what may not bear them.

A folder that a user names may hold other things as well, or may have been made to do harm. So it is a job's only with a
manifest of ours; only what the naming rule below names is moved, replaced or deleted; and below it no link is followed.
"""

import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from mgpu_ddp.data.listing import FILE_NAME
from mgpu_ddp.errors import UsageError
from mgpu_ddp.output.atomic_files import TEMPORARY
from mgpu_ddp.output.folders import LOCK
from mgpu_ddp.output.manifest import ARRAY, MANIFEST, PART_FILE, PARTS, STATUS, TABLES

NEXT, READY, OLD = ".next", ".ready", ".old"
FOLDERS = (PARTS, ".hydra", "logs", "profile")
FILES = (ARRAY, FILE_NAME, "errors.jsonl", "metrics.json", "classes.json", "report.html", MANIFEST, STATUS)
OURS = re.compile(
    "|".join(
        (
            PART_FILE,
            r"\.hydra/(config|hydra|overrides)\.yaml",
            r"logs/rank\d+\.log",
            r"profile/rank\d+\.json\.gz",
            *map(re.escape, FILES),
        )
    )
)


def is_ours(name: str) -> bool:
    """Tell by its name, relative to the run folder, whether a file is one of a result or a temporary beside it."""
    folder, slash, file = name.rpartition("/")
    temporary = TEMPORARY.fullmatch(file)
    return OURS.fullmatch(f"{folder}{slash}{temporary[1] if temporary else file}") is not None


def lies_in_the_way(name: str) -> bool:
    """True if a job may write at a path, relative to its run folder, or move or delete what is there."""
    return is_ours(name) or name == LOCK or name.partition("/")[0] in (PARTS, NEXT, READY, OLD)


def entries_in(folder: Path) -> Iterator[tuple[str, "os.DirEntry[str]"]]:
    """The entries of a run folder and in the folders of a result below it, by its name relative to the run folder."""
    for below in ("", *FOLDERS):
        with suppress(FileNotFoundError), os.scandir(folder / below) as entries:
            yield from ((os.path.join(below, entry.name), entry) for entry in entries)


def result_in(folder: Path) -> list[str]:
    """The files of a result, in the order in which they may appear: the manifest and the status speak of the rest."""
    marks = {MANIFEST: 1, STATUS: 2}
    names = [name for name, _ in entries_in(folder) if is_ours(name)]
    return sorted(names, key=lambda name: (marks.get(name, 0), name))


def remove_result(folder: Path) -> None:
    """Delete the files of a result, and the folder, which holds nothing else."""
    for name in reversed(result_in(folder)):
        (folder / name).unlink(missing_ok=True)
    remove_empty_folders(folder)
    folder.rmdir()


def remove_empty_folders(folder: Path) -> None:
    """Remove the folders of a result in which nothing is left."""
    for name in FOLDERS:
        with suppress(OSError):
            (folder / name).rmdir()


def check_layout(run_dir: Path) -> None:
    """Require that what bears a name of ours can be ours. Touches nothing.

    Raises:
        UsageError: there is a link, a pipe or the like, or a foreign file where only results of ours may lie.
    """
    for home in (run_dir, *(run_dir / name for name in (NEXT, READY, OLD))):
        for path in (*([home] if home != run_dir else []), *(home / name for name in FOLDERS)):
            _require_kind(run_dir, path, stat.S_ISDIR, "a folder")
        if not home.is_dir():
            continue
        for name, entry in entries_in(home):
            # The one lock of a job is at home, also while it works beside an older result.
            if is_ours(name) or (name == LOCK and home == run_dir):
                # The entry knows its kind without a call for each of many parts.
                if not entry.is_file(follow_symlinks=False):
                    _require_kind(run_dir, home / name, stat.S_ISREG, "a regular file")
            elif (home != run_dir and name not in FOLDERS) or is_foreign_table(name):
                raise _refusal(run_dir, home / name, "is not of a job")


def is_foreign_table(name: str) -> bool:
    """True for a file that readers of `predictions/` would take for rows of ours."""
    return name.startswith(f"{PARTS}/") and name.endswith(TABLES) and not is_ours(name)


def _require_kind(run_dir: Path, path: Path, is_kind: Callable[[int], bool], kind: str) -> None:
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if not is_kind(mode):
        raise _refusal(run_dir, path, f"is not {kind}")


def _refusal(run_dir: Path, path: Path, why: str) -> UsageError:
    name = str(path.relative_to(run_dir))
    return UsageError(
        f"output.dir must hold nothing but a job's own files under their names, got {str(run_dir)!r}, where"
        f" {name!r} {why}. Move it away or choose another."
    )


def check_unclaimed(run_dir: Path) -> None:
    """Require that a folder without a manifest holds nothing that a job would write. Touches nothing.

    Raises:
        UsageError: it does, so that is foreign.
    """
    if (run_dir / MANIFEST).exists():
        return
    found = [name for name in (PARTS, READY) if (run_dir / name).exists()] or result_in(run_dir)
    if (run_dir / LOCK).exists():
        # A claim that was cut short leaves both, before there is a manifest.
        found = [name for name in found if name != FILE_NAME and not TEMPORARY.fullmatch(name)]
    if found:
        raise UsageError(
            f"output.dir must be empty or hold this job, got {str(run_dir)!r} with foreign {found[0]}. Choose another."
        )
