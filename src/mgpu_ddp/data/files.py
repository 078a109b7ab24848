"""Images as files of their own, and the search for them in a folder."""

import logging
import os
import stat
from array import array
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mgpu_ddp.config.checks import protocol_of
from mgpu_ddp.config.schema import Config, FolderConfig, dataset_range
from mgpu_ddp.data import object_store
from mgpu_ddp.data.content import as_columns, check_of, content_of, status_of
from mgpu_ddp.data.encoded import EncodedSamples
from mgpu_ddp.data.image_names import EXTENSIONS, ImageNames, describe, log_left_out, most_common
from mgpu_ddp.data.input_file import open_input
from mgpu_ddp.data.listing import Listing, readable
from mgpu_ddp.errors import UsageError, plural

log = logging.getLogger("mgpu_ddp")

LINKS_OUT, BROKEN_LINKS = "behind links out of data.root (data.follow_outside)", "links to nothing"
IRREGULAR = "no regular files"


class FileSamples(EncodedSamples):
    """Image files, each by its path or URL relative to a root."""

    def __init__(self, root: str, files: Listing) -> None:
        is_remote = protocol_of(root) or (len(files) and protocol_of(os.fsdecode(files.path(0))))
        super().__init__(files, self._request if is_remote else None)
        self._root = os.fsencode(root)

    def _request(self, index: int) -> Future[bytes]:
        return object_store.start_read(object_store.join(os.fsdecode(self._root), os.fsdecode(self.files.path(index))))

    def fetch(self, index: int) -> bytes:
        with open_input(os.path.join(self._root, self.files.path(index))) as file:
            return file.read()


def list_folder(config: Config, known: Listing | None) -> Listing:
    """List a folder; what is known keeps its index, and new images are appended.

    Raises:
        UsageError: the folder is missing, unreadable or holds no image.
    """
    data: FolderConfig = config.data
    if known is not None and config.shard is not None:
        # More samples would move the borders between the shards.
        return _look_again(known, config)
    found = _find(data)
    log_left_out(found.left_out)
    if known is not None:
        files = known.grown(found.paths, **found.content)
    elif found.paths:
        files = Listing.build(found.paths, **found.content)
        _log_labels(files)
    else:
        kinds = ", ".join(data.extensions or EXTENSIONS)
        seen = f" ({describe(found.left_out)})" if found.left_out else ""
        raise UsageError(f"data.root={data.root!r} holds no image ({kinds}){seen}. Name another folder.")
    files.left_out = found.left_out
    return files


def _look_again(known: Listing, config: Config) -> Listing:
    """A known listing that tells which of this job's images have changed."""
    data, (start, stop) = config.data, dataset_range(config, len(known))
    check = check_of(data.check, is_remote=bool(protocol_of(data.root)))
    return known.checked(start, content_of(data.root, [known.path(i) for i in range(start, stop)], check))


def _log_labels(files: Listing) -> None:
    names = [readable(name) for name in files.classes()]
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    labels = f"labels from {plural(len(names), 'class folder')} ({shown})"
    why_not = "no labels: not every image lies in one level of class folders"
    log.info("%s images, %s", f"{len(files):,}", labels if names else why_not)


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The images of a folder: sorted bytes relative to it."""

    paths: list[bytes]
    content: dict[str, Any] = field(default_factory=dict)
    """Columns of a listing that tell the content of each."""
    left_out: dict[str, int] = field(default_factory=dict)
    """How many other files there are, by kind."""


def _find(data: FolderConfig) -> Found:
    names, check = ImageNames(data.extensions), check_of(data.check, is_remote=bool(protocol_of(data.root)))
    if not protocol_of(data.root):
        return find_images(data.root, follow_outside=data.follow_outside, names=names, check=check)
    paths = map(os.fsencode, object_store.find(data.root))
    mine = sorted(path for path in paths if names.take(path.rpartition(b"/")[2]))
    return Found(paths=mine, left_out=most_common(names.left_out))


def find_images(
    root: str, *, follow_outside: bool = False, names: ImageNames | None = None, check: str = "name"
) -> Found:
    """List every image file below a folder.

    Raises:
        UsageError: the root, or a folder below it, is missing or unreadable.
    """
    search = _Search(
        os.fsencode(os.path.abspath(root)),
        follow_outside=follow_outside,
        names=names or ImageNames(),
        with_status=check == "stat",
    )
    search.walk(b"")
    order = sorted(range(len(search.found)), key=search.found.__getitem__)
    paths = [search.found[number] for number in order]
    content: dict[str, Any] = {}
    if check == "stat":
        content = as_columns(np.array(search.statuses, dtype=np.int64).reshape(-1, 2)[order])
    elif check == "hash":
        content = content_of(root, paths, check)
    return Found(paths=paths, content=content, left_out=most_common(search.names.left_out))


class _Search:
    """A walk over a folder and the folders that it links to, each once.

    Real folders come before links to them, so that each is listed under its own name. Only regular files count: a FIFO
    or a device is never opened.
    """

    def __init__(self, top: bytes, *, follow_outside: bool, names: ImageNames, with_status: bool) -> None:
        self._top, self._follow_outside, self._with_status = top, follow_outside, with_status
        self._inside = os.path.join(os.path.realpath(top), b"")
        self._seen: set[tuple[int, int]] = set()
        """Devices and inodes of folders."""
        self._folders: list[bytes] = []
        self._links: list[bytes] = []
        self.names = names
        self.found: list[bytes] = []
        self.statuses = array("q")
        """Size and time of what was found, one after the other, where that is asked for."""

    def walk(self, folder: bytes) -> None:
        self._folders = [folder]
        while self._folders:
            while self._folders:
                self._read_folder(self._folders.pop())
            links, self._links = sorted(self._links, reverse=True), []
            for link in links:
                self._follow(link)

    def _read_folder(self, folder: bytes) -> None:
        path = os.path.join(self._top, folder) if folder else self._top
        inside = folder + b"/" if folder else b""
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in self._seen:
                return
            self._seen.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        self._links.append(inside + entry.name)
                    elif entry.is_dir(follow_symlinks=False):
                        self._folders.append(inside + entry.name)
                    elif not entry.is_file(follow_symlinks=False):
                        self.names.left_out[IRREGULAR] += 1
                    elif self.names.take(entry.name):
                        self.found.append(inside + entry.name)
                        if self._with_status:
                            self.statuses.extend(status_of(entry.path))
        except OSError as error:
            shown = os.fsdecode(path)
            raise UsageError(
                f"data.root must be a readable folder, got {shown!r} ({error.strerror}). Name another."
            ) from None

    def _follow(self, link: bytes) -> None:
        path = os.path.join(self._top, link)
        if not os.path.exists(path):
            self.names.left_out[BROKEN_LINKS] += 1
            return
        if not (self._follow_outside or os.path.realpath(path).startswith(self._inside)):
            self.names.left_out[LINKS_OUT] += 1
            return
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            self._folders.append(link)
        elif not stat.S_ISREG(status.st_mode):
            self.names.left_out[IRREGULAR] += 1
        elif self.names.take(os.path.basename(link)):
            self.found.append(link)
            if self._with_status:
                self.statuses.extend((status.st_size, status.st_mtime_ns))
