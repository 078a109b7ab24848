"""The rule by which names tell images from other files, and a count of what it leaves out."""

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from mgpu_ddp.preprocess import heic

log = logging.getLogger("mgpu_ddp")

EXTENSIONS = ("jpg", "jpeg", "jpe", "jfif", "png", "bmp", "gif", "webp", "tif", "tiff", "avif")
OF_THE_SYSTEM = (b"thumbs.db", b".ds_store", b"desktop.ini")
COPIED_METADATA = b"._"
"""Begins the names of files in which macOS keeps what another file system has no place for; they end as the image's."""
RAW = ("arw", "cr2", "cr3", "dng", "nef", "orf", "raf", "rw2")
UNREAD = frozenset(f".{kind}" for kind in (*heic.EXTENSIONS, *RAW, "exr", "j2k", "jp2", "jxl", "psd", "svg", "tga"))
"""Images that Pillow is not asked to read, or that take a package more."""
EXTENSION = re.compile(rb"\.[a-z0-9_+-]{1,9}")
WITHOUT, SYSTEM, OTHER = "without extension", "of the system", "of other kinds"
KINDS_SHOWN = 8
MOST_KINDS = 50


class ImageNames:
    """Tells an image by its name, and counts other files by their extension."""

    def __init__(self, extensions: Sequence[str] = ()) -> None:
        """With `extensions`, those alone are images; "" stands for a name without any."""
        known = extensions or (*EXTENSIONS, *(heic.EXTENSIONS if heic.is_installed() else ()))
        self._endings = tuple(b"." + os.fsencode(extension) for extension in known if extension)
        self._takes_bare = "" in extensions
        self.left_out: Counter[str] = Counter()

    def take(self, name: bytes) -> bool:
        """True for an image, by its name without folders; what is none is counted."""
        lower = name.lower()
        if lower.endswith(self._endings) and not lower.startswith(COPIED_METADATA):
            return True
        kind = kind_of(lower)
        if kind == WITHOUT and self._takes_bare:
            return True
        self.left_out[kind] += 1
        return False


def kind_of(lower: bytes) -> str:
    """Where a file that is no image counts, by its name in lower case."""
    if lower.startswith(COPIED_METADATA) or lower in OF_THE_SYSTEM:
        return SYSTEM
    stem, dot, extension = lower.rpartition(b".")
    if not dot or not stem:
        return WITHOUT
    return f".{extension.decode()}" if EXTENSION.fullmatch(dot + extension) else OTHER


def images_among(left_out: Mapping[str, int]) -> dict[str, int]:
    """Counts without those of files that may well lie beside images."""
    return {kind: count for kind, count in left_out.items() if kind in UNREAD or kind == SYSTEM}


def most_common(left_out: Counter[str]) -> dict[str, int]:
    """Counts of a bounded number of kinds, the most common first."""
    kinds = dict(left_out.most_common(MOST_KINDS))
    rest = left_out.total() - sum(kinds.values())
    return {**kinds, OTHER: kinds.get(OTHER, 0) + rest} if rest else kinds


def describe(left_out: Mapping[str, int]) -> str:
    """The files left out, in one line, and how to have them: `3 files left out: 2 .heic, 1 .txt`."""
    total = sum(left_out.values())
    kinds = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count:,} {kind}" for kind, count in kinds[:KINDS_SHOWN]]
    more = ["..."] if len(kinds) > KINDS_SHOWN else []
    advice = f"; {heic.INSTALL} reads HEIC" if any(kind[1:] in heic.EXTENSIONS for kind in left_out) else ""
    return f"{total:,} {'file' if total == 1 else 'files'} left out: {', '.join([*shown, *more])}{advice}"


def log_left_out(left_out: Mapping[str, int]) -> None:
    if left_out:
        log.info("%s", describe(left_out))
