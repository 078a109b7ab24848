"""Images as files of their own, and the search for them in a folder."""

import logging
import os
import stat
from concurrent.futures import Future

from mgpu_ddp.config.checks import protocol_of
from mgpu_ddp.config.schema import Config, FolderConfig
from mgpu_ddp.data import object_store
from mgpu_ddp.data.encoded import EncodedSamples
from mgpu_ddp.data.input_file import open_input
from mgpu_ddp.data.listing import EXTENSIONS, Listing, is_image, readable
from mgpu_ddp.errors import UsageError

log = logging.getLogger("mgpu_ddp")


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
        return known
    paths = _find(data)
    if known is not None:
        return known.grown(paths)
    if not paths:
        kinds = ", ".join(extension.decode().lstrip(".") for extension in EXTENSIONS)
        raise UsageError(f"data.root={data.root!r} holds no image ({kinds}). Name another folder.")
    files = Listing.build(paths)
    names = [readable(name) for name in files.classes()]
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    labels = f"labels from {len(names):,} class folders ({shown})"
    why_not = "no labels: not every image lies in one level of class folders"
    log.info("%s images, %s", f"{len(paths):,}", labels if names else why_not)
    return files


def _find(data: FolderConfig) -> list[bytes]:
    if not protocol_of(data.root):
        return find_images(data.root, follow_outside=data.follow_outside)
    return sorted(name for name in map(os.fsencode, object_store.find(data.root)) if is_image(name))


def find_images(root: str, *, follow_outside: bool) -> list[bytes]:
    """List every image file below a folder: sorted bytes relative to it.

    Raises:
        UsageError: the root, or a folder below it, is missing or unreadable.
    """
    search = _Search(os.fsencode(os.path.abspath(root)), follow_outside=follow_outside)
    search.walk(b"")
    return sorted(search.found)


class _Search:
    """A walk over a folder and the folders that it links to, each once.

    Real folders come before links to them, so that each is listed under its own name. Only regular files count: a FIFO
    or a device is never opened.
    """

    def __init__(self, top: bytes, *, follow_outside: bool) -> None:
        self._top, self._follow_outside = top, follow_outside
        self._inside = os.path.join(os.path.realpath(top), b"")
        self._seen: set[tuple[int, int]] = set()
        """Devices and inodes of folders."""
        self._folders: list[bytes] = []
        self._links: list[bytes] = []
        self.found: list[bytes] = []

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
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in self._seen:
                return
            self._seen.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                for entry in entries:
                    relative = os.path.join(folder, entry.name)
                    if entry.is_symlink():
                        self._links.append(relative)
                    elif entry.is_dir(follow_symlinks=False):
                        self._folders.append(relative)
                    elif is_image(entry.name) and entry.is_file(follow_symlinks=False):
                        self.found.append(relative)
        except OSError as error:
            shown = os.fsdecode(path)
            raise UsageError(
                f"data.root must be a readable folder, got {shown!r} ({error.strerror}). Name another."
            ) from None

    def _follow(self, link: bytes) -> None:
        path = os.path.join(self._top, link)
        if not os.path.exists(path):
            return
        if not (self._follow_outside or os.path.realpath(path).startswith(self._inside)):
            return
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            self._folders.append(link)
        elif stat.S_ISREG(mode) and is_image(link):
            self.found.append(link)
