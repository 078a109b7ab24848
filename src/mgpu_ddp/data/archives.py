"""Files that hold many images each: which they are, what lies in them, and whether they still are what was indexed.

Ranks index files side by side; rank 0 keeps the result in the listing. A later start indexes those alone whose size
or time has changed.
"""

import glob
import itertools
import logging
import math
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from mgpu_ddp.config.checks import protocol_of, require
from mgpu_ddp.data import object_store
from mgpu_ddp.data.listing import Listing, Shard
from mgpu_ddp.distributed.channel import Channel
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import StateError, UsageError

log = logging.getLogger("mgpu_ddp")

MOST_FILES = 1_000_000
OPEN_FILES = 16
"""That one loader worker keeps open."""

Opened = TypeVar("Opened")


class Index(Protocol):
    def __call__(self, path: str, *, name: str) -> "Indexed":
        """Say what lies in a file, whose images are called after `name`."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Indexed:
    """One file's share of the listing: `rows` has the columns of `Listing.of`."""

    shard: Shard
    rows: Any


def expand(pattern: str) -> list[str]:
    """The files that a pattern with braces, as shells have them, or with * stands for.

    Raises:
        UsageError: there is none, or more than anybody means.
    """
    found: list[str] = []
    for name in _expand_braces(pattern):
        if protocol_of(name) and glob.has_magic(name):
            found += object_store.glob(name)
        elif glob.has_magic(name) and not os.path.exists(name):
            found += sorted(glob.glob(name))
        else:
            found.append(name)
    if not found:
        raise UsageError(f"data.urls must name at least one file, got {pattern!r}. Name another pattern.")
    return found


def _expand_braces(pattern: str) -> Iterator[str]:
    rule, remedy = f"a pattern of at most {MOST_FILES:,} files, without braces in braces", "Use several jobs or *."
    require(re.search(r"\{[^{}]*\{", pattern) is None, "data.urls", rule, pattern, remedy)
    # Text and braces in turn.
    pieces = re.split(r"(\{[^{}]*\})", pattern)
    choices = [_choices(piece[1:-1]) or [piece] if piece.startswith("{") else [piece] for piece in pieces]
    require(math.prod(map(len, choices)) <= MOST_FILES, "data.urls", rule, pattern, remedy)
    return map("".join, itertools.product(*choices))


def _choices(inside: str) -> Sequence[str]:
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if span is None:
        return inside.split(",") if "," in inside else []
    first, last = int(span[1]), int(span[2])
    # A file too many will do to refuse it.
    last = min(last, first + MOST_FILES) if last >= first else max(last, first - MOST_FILES)
    width = len(span[1]) if span[1].startswith("0") else 0
    step = 1 if last >= first else -1
    return [str(number).zfill(width) for number in range(first, last + step, step)]


def root_of(pattern: str) -> str:
    """The folder that a pattern names outright; names in the table are relative to it."""
    return os.path.dirname(re.split(r"[{*?\[]", pattern, maxsplit=1)[0])


def index_shards(pattern: str, index: Index, known: Listing | None, world: World) -> Listing | None:
    """The listing of all files, on rank 0. Collective: every rank calls this; `known` counts on rank 0 alone.

    Raises:
        UsageError: a file is missing or is not what it should be.
    """
    paths: list[str] = []
    kept: dict[int, Indexed] = {}
    stale: list[int] = []
    with world.together("look at the files"):
        if world.rank == 0:
            paths = expand(pattern)
            kept = _unchanged(paths, known)
            stale = [number for number in range(len(paths)) if number not in kept]
            log.info("%s files, of which %s are to be indexed", f"{len(paths):,}", f"{len(stale):,}")
    todo: list[tuple[int, str]] = world.share("files to index", [(number, paths[number]) for number in stale])
    mine: list[tuple[int, Indexed]] = []
    with world.together("index the files"):
        root = root_of(pattern)
        mine = [
            (number, index(path, name=os.path.relpath(path, root))) for number, path in todo[world.rank :: world.size]
        ]
    found = _gather(mine, -(-len(todo) // world.size), world)
    with world.together("join the index"):
        if world.rank == 0:
            if known is not None and not found and len(kept) == len(known.shards):
                return known
            return _join([(kept | found)[number] for number in range(len(paths))], refreshed=known is not None)
    return None


def _unchanged(paths: list[str], known: Listing | None) -> dict[int, Indexed]:
    """Of the files those that the listing knows as they are now, by their place."""
    before: dict[str, tuple[Shard, int]] = {}
    first = 0
    for shard in known.shards if known is not None else []:
        before[shard.path] = (shard, first)
        first += sum(shard.groups)
    kept: dict[int, Indexed] = {}
    for number, path in enumerate(paths):
        if path not in before:
            continue
        shard, first = before[path]
        if (shard.num_bytes, shard.modified_ns) == look_at(path):
            assert known is not None
            kept[number] = Indexed(shard=shard, rows=known.table.slice(first, sum(shard.groups)))
    return kept


def look_at(path: str) -> tuple[int, int]:
    """Size in bytes and time of change in ns of a file; of a URL, what stands for that.

    Raises:
        UsageError: it is missing or forbidden.
    """
    try:
        return _look_at(path)
    except (OSError, ValueError) as error:
        text = getattr(error, "strerror", None) or str(error)
        rule = "files that are there and may be read"
        raise UsageError(f"data.urls must name {rule}, got {path!r} ({text}). Mend it.") from None


def _look_at(path: str) -> tuple[int, int]:
    if protocol_of(path):
        return object_store.look_at(path)
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _gather(mine: list[tuple[int, Indexed]], rounds: int, world: World) -> dict[int, Indexed]:
    """Give rank 0 what every rank has indexed, one file of each rank at a time. Collective."""
    if world.size == 1:
        return dict(mine)
    found: dict[int, Indexed] = {}
    # A name that no other channel of this process has.
    channel = Channel(world, f"index/{world.link.turn}", world.heartbeat.timeout_s)
    for turn in range(rounds):
        payload = mine[turn] if turn < len(mine) else None
        for heard in channel.gather(turn, payload):
            if world.rank == 0 and heard is not None:
                found[heard[0]] = heard[1]
    channel.close()
    return found


def _join(parts: list[Indexed], *, refreshed: bool) -> Listing:
    import pyarrow as pa

    table = pa.concat_tables([pa.table(part.rows) for part in parts]).combine_chunks()
    columns = [column.chunk(0) if column.num_chunks else pa.array([], column.type) for column in table.columns]
    if not table.num_rows:
        remedy = "Name others; in tars data.extensions are what follows the first dot of a member's name."
        raise UsageError(f"data.urls must hold at least one image, got none in any file. {remedy}")
    files = Listing.of(**dict(zip(table.column_names, columns, strict=True)), shards=[part.shard for part in parts])
    files.refreshed = refreshed
    known = len(files) - files.table["label"].null_count
    log.info("%s images, %s labels", f"{len(files):,}", f"{known:,}" if known else "no")
    return files


class OpenShards(Generic[Opened]):
    """Files that stay open for a while, each seen to be what was indexed when it is opened."""

    def __init__(self, shards: list[Shard], opener: Callable[[str], Opened], closer: Callable[[Opened], None]) -> None:
        self._shards, self._opener, self._closer = shards, opener, closer
        self._open: OrderedDict[int, Opened] = OrderedDict()

    def __getitem__(self, number: int) -> Opened:
        """An open file.

        Raises:
            StateError: it has changed since it was indexed.
        """
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self._shards[number]
        try:
            opened = self._opener(shard.path)
            now = _look_at(shard.path)
        except FileNotFoundError:
            raise _changed(shard, "no such file") from None
        except PermissionError:
            raise _changed(shard, "none that may be read") from None
        if now != (shard.num_bytes, shard.modified_ns):
            self._closer(opened)
            same_size = now[0] == shard.num_bytes
            found = "another time of change" if same_size else f"{now[0]:,} bytes instead of {shard.num_bytes:,}"
            raise _changed(shard, found)
        if len(self._open) >= OPEN_FILES:
            self._closer(self._open.popitem(last=False)[1])
        self._open[number] = opened
        return opened


def _changed(shard: Shard, found: str) -> StateError:
    return StateError(
        f"{shard.path!r} must stay as it was indexed, got {found}. What was committed stays valid; start again to index"
        " it anew."
    )
