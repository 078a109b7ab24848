"""Patterns of file names: braces as shells have them, and *."""

import glob
import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence

from mgpu_ddp.config.checks import protocol_of, require
from mgpu_ddp.data import object_store
from mgpu_ddp.errors import UsageError

MOST_FILES = 1_000_000


def expand(pattern: str) -> list[str]:
    """List the paths or URLs that a pattern stands for.

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
        raise UsageError(f"data.urls={pattern!r} matches no file. Correct the pattern.")
    return found


def root_of(pattern: str) -> str:
    """The folder that a pattern names outright; the names of images are relative to it."""
    return os.path.dirname(re.split(r"[{*?\[]", pattern, maxsplit=1)[0])


def _expand_braces(pattern: str) -> Iterator[str]:
    rule, remedy = f"a pattern of at most {MOST_FILES:,} files without nested braces", "Use several jobs or *."
    require(re.search(r"\{[^{}]*\{", pattern) is None, "data.urls", rule, pattern, remedy)
    # Text and braces in turn.
    pieces = re.split(r"(\{[^{}]*\})", pattern)
    choices = [_choices(piece[1:-1]) or [piece] if piece.startswith("{") else [piece] for piece in pieces]
    require(math.prod(map(len, choices)) <= MOST_FILES, "data.urls", rule, pattern, remedy)
    return map("".join, itertools.product(*choices))


def _choices(inside: str) -> Sequence[str]:
    """Read 1..3 or a,b,c; empty for anything else, which stands for itself."""
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if span is None:
        return inside.split(",") if "," in inside else []
    first, last = int(span[1]), int(span[2])
    # One file too many is enough to be refused.
    last = min(last, first + MOST_FILES) if last >= first else max(last, first - MOST_FILES)
    width = len(span[1]) if span[1].startswith("0") else 0
    step = 1 if last >= first else -1
    return [str(number).zfill(width) for number in range(first, last + step, step)]
