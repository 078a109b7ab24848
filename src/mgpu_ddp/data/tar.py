"""Images in tar files: an index of where each lies, then reads of just those bytes.

Source of the naming: WebDataset. Consecutive members whose names are equal up to the first dot of the last component
form a sample, and what follows that dot says what each is. Indexing reads headers only, and members that hold labels
where those are asked for; nothing is unpickled, and nothing but images is decoded.
"""

import errno
import io
import itertools
import os
import posixpath
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple, cast

import numpy as np

from mgpu_ddp.config.checks import protocol_of, require
from mgpu_ddp.config.schema import Config, WebDatasetConfig
from mgpu_ddp.data import object_store
from mgpu_ddp.data.archives import ArchiveIndex, OpenArchives, index_archives, size_and_mtime, unreadable
from mgpu_ddp.data.encoded import EncodedSamples
from mgpu_ddp.data.image_names import ImageNames, images_among
from mgpu_ddp.data.input_file import open_descriptor, open_input
from mgpu_ddp.data.labels import as_labels
from mgpu_ddp.data.listing import Archive, Listing
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import MgpuError, UsageError

LABEL_BYTES = 18
"""A longer text is no label."""
HEADER_BYTES = 16 << 20
"""A longer header (a long name, or attributes) is none."""
NOWHERE = (0, -1)
"""The place of an image whose bytes do not lie in the tar in one piece."""
NO_BYTES = "a sparse file, or a link to no image of this tar: unpack and pack it again without"
COMPRESSED = (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5")
"""First bytes of gzip, bzip2, xz and zstd."""

Place = tuple[int, int]
"""The first byte in the tar, and the number of bytes."""


class Member(NamedTuple):
    """A file of a tar, or a link that may stand for one. There are millions: a frozen dataclass takes twice as long."""

    name: str
    sample: str
    """Its name up to the first dot of the last component."""
    extension: str
    """The rest, after that dot, in lower case."""
    place: Place
    target: str | None
    """The name that a symbolic link leads to."""


def list_tars(config: Config, known: Listing | None, world: World) -> Listing | None:
    """List the images of all tars, on rank 0. Collective: every rank calls this.

    Raises:
        UsageError: a tar is missing, broken or compressed; labels are asked for and there are none.
    """
    data: WebDatasetConfig = config.data
    files = index_archives(data.urls, partial(index_tar, data), known, world, check=data.check)
    with world.together("look for labels"):
        # A folder that is continued may have been begun without this key: its claim says so.
        none_there = files is not None and known is None and files.table["label"].null_count == len(files)
        rule = "the extension of a member right before or after its images"
        found = not (none_there and data.label_extension)
        require(found, "data.label_extension", rule, data.label_extension, "No image has one: leave it out.")
    return files


def index_tar(data: WebDatasetConfig, path: str, name: str) -> ArchiveIndex:
    """Find the images in a tar.

    Raises:
        UsageError: it cannot be read to its end, or a label is not a whole number.
    """
    import pyarrow as pa

    paths: list[bytes] = []
    labels: list[int | None] = []
    places: list[Place] = []
    links: dict[int, str] = {}
    by_name: dict[str, Place] = {}
    names = ImageNames()
    num_bytes, modified_ns = size_and_mtime(path)
    with _open(path) as opened, _read_tar(path, opened) as file:
        for _, members in itertools.groupby(_members(file, path, by_name), key=attrgetter("sample")):
            images, label = _read_sample(members, data, opened, path, names)
            for image in images:
                if image.target is not None:
                    links[len(paths)] = image.target
                paths.append(os.fsencode(f"{name}/{image.name}"))
                labels.append(label)
                places.append(image.place)
    _follow_links(links, places, by_name)
    offsets, sizes = np.array(places, dtype=np.int64).reshape(-1, 2).T
    columns = {
        "path": pa.array(paths, type=pa.large_binary()),
        "label": as_labels(pa.array(labels, type=pa.int64()), f"data.label_extension={data.label_extension}"),
        "offset": pa.array(offsets),
        "size": pa.array(sizes),
    }
    archive = Archive(
        path=path,
        num_bytes=num_bytes,
        modified_ns=modified_ns,
        groups=[len(paths)],
        left_out=images_among(names.left_out),
    )
    return ArchiveIndex(archive=archive, rows=pa.record_batch(columns))


def _read_sample(
    members: Iterable[Member], data: WebDatasetConfig, opened: io.BufferedReader, path: str, names: ImageNames
) -> tuple[list[Member], int | None]:
    """The images of a sample, and its label."""
    images: list[Member] = []
    label: int | None = None
    for member in members:
        if member.extension == data.label_extension:
            label = _read_label(opened, member, path)
        elif _is_image(member, data, names):
            images.append(member)
    return images, label


def _is_image(member: Member, data: WebDatasetConfig, names: ImageNames) -> bool:
    if data.extensions:
        return member.extension in data.extensions
    return names.take(os.fsencode(posixpath.basename(member.name)))


def _follow_links(links: dict[int, str], places: list[Place], by_name: dict[str, Place]) -> None:
    """Fill in the places of images that are symbolic links, to the last member of a name."""
    if links:
        by_name = {posixpath.normpath(name): place for name, place in by_name.items()}
        for number, target in links.items():
            places[number] = by_name.get(posixpath.normpath(target), NOWHERE)


class HeaderReader(io.BufferedReader):
    """Reads at most as much at once as a header may hold: how much that is, the header before it says."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= HEADER_BYTES:
            raise ValueError(f"a header of {size} bytes")
        return super().read(size)


def _open(path: str) -> HeaderReader:
    try:
        if protocol_of(path):
            return HeaderReader(object_store.RemoteFile(path), object_store.BUFFER_BYTES)
        return HeaderReader(open_input(path))
    except OSError as error:
        raise unreadable(path, error) from None


def _read_tar(path: str, opened: io.BufferedReader) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=opened, mode="r:", errors="surrogateescape", encoding="utf-8")
    except (tarfile.TarError, OSError, ValueError) as error:
        opened.seek(0)
        if opened.read(2) in COMPRESSED:
            # Nothing in it can be found without unpacking all that comes before it.
            raise UsageError(f"data.urls: {path!r} is compressed, so it has no random access. Unpack it.") from None
        raise UsageError(f"data.urls: {path!r} is no tar ({error}). Fix it, or correct the pattern.") from None


def _members(file: tarfile.TarFile, path: str, by_name: dict[str, Place]) -> Iterator[Member]:
    """Read the headers of a tar to its proper end; `by_name` learns where the last member of each name lies."""
    try:
        for info in _headers(file):
            place = NOWHERE
            if info.isreg() and not info.issparse():
                place = info.offset_data, info.size
            elif info.islnk():
                # It means the member before it, whatever of that name may come later.
                place = by_name.get(info.linkname, NOWHERE)
            elif not (info.isreg() or info.issym()):
                continue
            by_name[info.name] = place
            yield _to_member(info, place)
        _check_end(file, path)
    except MgpuError:
        raise
    except Exception as error:  # tarfile raises all kinds for what is broken
        raise _broken(file, path, f"{type(error).__name__}: {error}") from None


def _headers(file: tarfile.TarFile) -> Iterable[tarfile.TarInfo]:
    while (info := file.next()) is not None:
        # It would keep them all.
        file.members = []  # type: ignore[attr-defined]
        yield info


def _to_member(info: tarfile.TarInfo, place: Place) -> Member:
    folder, slash, base = info.name.rpartition("/")
    key, _, extension = base.partition(".")
    target = posixpath.join(folder, info.linkname) if info.issym() else None
    return Member(info.name, folder + slash + key, extension.lower(), place, target)


def _check_end(file: tarfile.TarFile, path: str) -> None:
    """Refuse a tar that is cut off or goes on: tarfile takes whatever it does not understand for the end."""
    assert file.fileobj is not None
    file.fileobj.seek(file.offset)
    last = file.fileobj.read(tarfile.BLOCKSIZE)
    if len(last) < tarfile.BLOCKSIZE:
        raise _broken(file, path, "it was cut off")
    if last != bytes(tarfile.BLOCKSIZE):
        raise _broken(file, path, "no header")
    for content in _rest(cast(HeaderReader, file.fileobj), file.offset):
        if content.strip(b"\0"):
            raise UsageError(
                f"data.urls: something follows the end of the tar {path!r} at byte {file.offset:,}. Join tars with"
                " tar --concatenate, or name each."
            )


def _rest(opened: HeaderReader, place: int) -> Iterator[bytes]:
    """Read on from a place, without the holes of a sparse file, which are zeros."""
    raw: Any = opened.raw
    while True:
        try:
            raw.seek(place, os.SEEK_DATA if isinstance(raw, io.FileIO) else os.SEEK_SET)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return
        content = raw.read(object_store.BUFFER_BYTES)
        if not content:
            return
        place = raw.tell()
        yield content


def _broken(file: tarfile.TarFile, path: str, why: str) -> UsageError:
    return UsageError(f"data.urls: the tar {path!r} is broken at byte {file.offset:,} ({why}). Copy it again.")


def _read_label(opened: io.BufferedReader, member: Member, path: str) -> int:
    first, size = member.place
    opened.seek(first)
    text = opened.read(max(0, min(size, LABEL_BYTES)))
    try:
        if size > LABEL_BYTES:
            raise ValueError
        return int(text)
    except ValueError:
        raise UsageError(
            f"data.label_extension: {member.name!r} in {path!r} holds {text!r}, not a whole number. Leave the key out,"
            " or fix the tar."
        ) from None


class TarSamples(EncodedSamples):
    """Images in tars, read by where they lie."""

    def __init__(self, files: Listing) -> None:
        is_remote = any(protocol_of(tar.path) for tar in files.archives)
        super().__init__(files, self._request if is_remote else None)
        self._stops = np.cumsum([tar.groups[0] for tar in files.archives])
        self._offsets, self._sizes = (files.table[name].chunk(0) for name in ("offset", "size"))
        self._tars = OpenArchives(files.archives, open_descriptor, os.close)
        self._urls: OpenArchives[str] = OpenArchives(files.archives, str, lambda url: None)

    def _find(self, index: int) -> tuple[int, int, int]:
        """The tar's number, the image's first byte in it, and the number of bytes.

        Raises:
            ValueError: the image has no bytes of its own.
        """
        size = self._sizes[index].as_py()
        if size < 0:
            raise ValueError(NO_BYTES)
        return int(np.searchsorted(self._stops, index, side="right")), self._offsets[index].as_py(), size

    def _request(self, index: int) -> Future[bytes]:
        try:
            tar, first, size = self._find(index)
        except ValueError as error:
            failed: Future[bytes] = Future()
            failed.set_exception(error)
            return failed
        return object_store.start_read(self._urls[tar], first, first + size)

    def fetch(self, index: int) -> bytes:
        tar, first, size = self._find(index)
        data = os.pread(self._tars[tar], size, first)
        if len(data) < size:
            raise EOFError(f"the tar ends {size - len(data):,} bytes before this image does")
        return data
