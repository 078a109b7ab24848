"""Archives, files that hold many images each (tars and Parquet): their index, and a check that they stay as indexed.

Ranks index archives side by side, and rank 0 keeps the result in the listing. A later start indexes only those whose
size or modification time has changed.
"""

import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from mgpu_ddp.config.checks import protocol_of
from mgpu_ddp.data import object_store
from mgpu_ddp.data.boxes import require_boxes
from mgpu_ddp.data.carried import from_text
from mgpu_ddp.data.image_names import log_left_out, most_common
from mgpu_ddp.data.labels import is_text, log_labels, number_names
from mgpu_ddp.data.listing import CARRIED_KEY, Archive, Listing
from mgpu_ddp.data.patterns import expand, root_of
from mgpu_ddp.distributed.channel import Channel
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import StateError, UsageError, cause_of

log = logging.getLogger("mgpu_ddp")

OPEN_FILES = 16
"""Kept open by one loader worker."""

Opened = TypeVar("Opened")


@dataclass(frozen=True, kw_only=True, slots=True)
class ArchiveIndex:
    """One archive's part of the listing."""

    archive: Archive
    rows: Any
    """An Arrow record batch or table with the columns of `Listing.of`, and in its metadata what is carried."""


IndexArchive = Callable[[str, str], ArchiveIndex]
"""Index the archive at a path; the names of its images begin with the given name."""


def index_archives(
    pattern: str, index: IndexArchive, known: Listing | None, world: World, *, check: str
) -> Listing | None:
    """List the images of all archives, on rank 0. Collective: every rank calls this; `known` counts on rank 0 alone.

    `check` is `data.check`.

    Raises:
        UsageError: an archive is missing or cannot be read.
    """
    paths: list[str] = []
    kept: dict[int, ArchiveIndex] = {}
    stale: list[int] = []
    with world.together("look at the archives"):
        if world.rank == 0:
            paths = expand(pattern)
            kept = _unchanged(paths, known)
            stale = [number for number in range(len(paths)) if number not in kept]
            log.info("%s files, %s of them to index", f"{len(paths):,}", f"{len(stale):,}")
    todo: list[tuple[int, str]] = world.share("archives to index", [(number, paths[number]) for number in stale])
    root = root_of(pattern)
    with world.together("index the archives"):
        mine = [(number, index(path, os.path.relpath(path, root))) for number, path in todo[world.rank :: world.size]]
    found = _gather(mine, -(-len(todo) // world.size), world)
    with world.together("join the index"):
        if world.rank == 0:
            if known is not None and not found and len(kept) == len(known.archives):
                return _counted(known)
            files = _join([(kept | found)[number] for number in range(len(paths))], known)
            if known is not None:
                _note_changed(files, known, check)
            return _counted(files)
    return None


def _note_changed(files: Listing, known: Listing, check: str) -> None:
    """Find the rows of archives that are not as they were indexed before."""
    before = {archive.path: archive for archive in known.archives}
    changed, first = [np.empty(0, np.int64)], 0
    for archive in files.archives:
        rows = sum(archive.rows)
        was = before.get(archive.path, archive)
        if not _is_as_indexed(was, (archive.num_bytes, archive.modified_ns)):
            changed.append(np.arange(first, first + rows))
        first += rows
    if len(changed) > 1 and check == "name":
        text = "%d of the files changed since they were indexed; committed rows stay (data.check=stat: predicted again)"
        log.warning(text, len(changed) - 1)
    elif check == "stat":
        files.changed = np.concatenate(changed)


def _counted(files: Listing) -> Listing:
    """Count what is left out of all archives."""
    left_out: Counter[str] = Counter()
    for archive in files.archives:
        left_out.update(archive.left_out)
    files.left_out = most_common(left_out)
    log_left_out(files.left_out)
    return files


def _unchanged(paths: list[str], known: Listing | None) -> dict[int, ArchiveIndex]:
    """The parts of a known listing that still hold, by their place in `paths`."""
    import pyarrow as pa

    if known is None:
        return {}
    before: dict[str, ArchiveIndex] = {}
    first = 0
    for archive in known.archives:
        count = sum(archive.rows)
        rows = known.table.slice(first, count)
        if known.label_names is not None:
            names = pa.array(known.label_names, pa.large_string()).take(rows["label"].combine_chunks())
            rows = rows.set_column(rows.column_names.index("label"), "label", names)
        before[archive.path] = ArchiveIndex(archive=archive, rows=rows)
        first += count
    return {
        number: before[path]
        for number, path in enumerate(paths)
        if path in before and _is_as_indexed(before[path].archive, size_and_mtime(path))
    }


def _is_as_indexed(archive: Archive, now: tuple[int, int]) -> bool:
    return (archive.num_bytes, archive.modified_ns) == now


def size_and_mtime(path: str) -> tuple[int, int]:
    """The size in bytes and the modification time in ns of an archive, or what stands for it where it is a URL.

    Raises:
        UsageError: it is missing or forbidden.
    """
    try:
        return _size_and_mtime(path)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


def _size_and_mtime(path: str) -> tuple[int, int]:
    if protocol_of(path):
        return object_store.size_and_version(path)
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def unreadable(path: str, error: Exception) -> UsageError:
    """The error for an archive that cannot be read."""
    return UsageError(f"data.urls: {path!r} cannot be read ({cause_of(error)}). Fix it, or correct the pattern.")


def _gather(mine: list[tuple[int, ArchiveIndex]], rounds: int, world: World) -> dict[int, ArchiveIndex]:
    """Give rank 0 what every rank has indexed, one archive of each rank at a time. Collective."""
    if world.size == 1:
        return dict(mine)
    found: dict[int, ArchiveIndex] = {}
    # A name that no other channel of this process has.
    channel = Channel(world, f"index/{world.link.turn}", world.heartbeat.timeout_s)
    for turn in range(rounds):
        payload = mine[turn] if turn < len(mine) else None
        for heard in channel.gather(turn, payload):
            if world.rank == 0 and heard is not None:
                found[heard[0]] = heard[1]
    channel.close()
    return found


def _join(parts: list[ArchiveIndex], known: Listing | None) -> Listing:
    import pyarrow as pa

    table = pa.concat_tables(_with_labels_of_one_kind([pa.table(part.rows) for part in parts])).combine_chunks()
    if "box" in table.column_names:
        require_boxes(table.num_rows)
    if not table.num_rows:
        raise UsageError(
            "data.urls: none of the files holds an image. Name others; for tars, data.extensions are what follows the"
            " first dot of a member's name."
        )
    columns = {name: column.chunk(0) for name, column in zip(table.column_names, table.columns, strict=True)}
    carried, names = _carried_by_all(parts), None
    if is_text(columns["label"].type):
        names_before = known.label_names if known is not None else None
        columns["label"], names = number_names(columns["label"], names_before or (), "data.label_column")
    files = Listing.of(**columns, archives=[part.archive for part in parts], label_names=names, carried=carried)
    files.refreshed = known is not None
    log_labels(len(files), len(files) - files.table["label"].null_count, names)
    return files


def _carried_by_all(parts: list[ArchiveIndex]) -> Any:
    """The schema of what is carried, where anything is.

    Raises:
        UsageError: files have columns of different types.
    """
    schemas = [from_text((part.rows.schema.metadata or {}).get(CARRIED_KEY.encode(), b"")) for part in parts]
    for part, schema in zip(parts, schemas, strict=True):
        for field, other in zip(schemas[0], schema, strict=True):
            if field.type != other.type:
                raise UsageError(
                    f"data.carry: the column {field.name!r} is {field.type} in {parts[0].archive.path!r}, but"
                    f" {other.type} in {part.archive.path!r}. Write it as one type in all files."
                )
    return schemas[0]


def _with_labels_of_one_kind(tables: list[Any]) -> list[Any]:
    """Tables whose labels are all names or all numbers; where there are none, they may be either.

    Raises:
        UsageError: some files have names, and others numbers.
    """
    import pyarrow as pa

    texts = [is_text(table["label"].type) for table in tables]
    if not any(texts):
        return tables
    for place, table in enumerate(tables):
        if not texts[place] and table["label"].null_count < len(table):
            raise UsageError(
                "data.label_column holds names in some files and numbers in others. Give all of them one kind."
            )
    place = tables[0].column_names.index("label")
    return [table.set_column(place, "label", table["label"].cast(pa.large_string())) for table in tables]


class OpenArchives(Generic[Opened]):
    """Archives that stay open for a while; opening one checks that it is as it was indexed."""

    def __init__(
        self, archives: list[Archive], opener: Callable[[str], Opened], closer: Callable[[Opened], None]
    ) -> None:
        self._archives, self._opener, self._closer = archives, opener, closer
        self._open: OrderedDict[int, Opened] = OrderedDict()

    def __getitem__(self, number: int) -> Opened:
        """An open archive.

        Raises:
            StateError: it has changed since it was indexed.
        """
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        opened = self._open_unchanged(self._archives[number])
        if len(self._open) >= OPEN_FILES:
            self._closer(self._open.popitem(last=False)[1])
        self._open[number] = opened
        return opened

    def _open_unchanged(self, archive: Archive) -> Opened:
        try:
            opened = self._opener(archive.path)
            now = _size_and_mtime(archive.path)
        except FileNotFoundError:
            raise _changed(archive, "it is gone") from None
        except PermissionError:
            raise _changed(archive, "it may no longer be read") from None
        if not _is_as_indexed(archive, now):
            self._closer(opened)
            same_size = now[0] == archive.num_bytes
            found = "another modification time" if same_size else f"{now[0]:,} bytes instead of {archive.num_bytes:,}"
            raise _changed(archive, found)
        return opened


def _changed(archive: Archive, how: str) -> StateError:
    return StateError(
        f"{archive.path!r} has changed since it was indexed ({how}). What was committed stays: start again to index it"
        " anew."
    )
