"""Images in tar files: an index of where each lies, then reads of just those bytes.

Source of the naming: WebDataset. Members in a row whose names are equal up to the first dot of the last component make
a sample, and what follows that dot says what each is. Only headers are read to index a tar, and members that hold
labels where those are asked for; nothing is unpickled, and nothing but images is decoded.
"""

import io
import os
import posixpath
import tarfile
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np

from mgpu_ddp.config.checks import protocol_of
from mgpu_ddp.config.schema import WebDatasetConfig
from mgpu_ddp.data import object_store
from mgpu_ddp.data.archives import Indexed, OpenShards, look_at
from mgpu_ddp.data.encoded import ImageSamples
from mgpu_ddp.data.listing import EXTENSIONS, Listing, Shard, as_labels
from mgpu_ddp.errors import MgpuError, UsageError

LABEL_BYTES = 18
"""More than a whole number takes is no label."""
NOWHERE = (0, -1)
"""The place of an image whose bytes do not lie in the tar in one piece."""
NO_BYTES = "a sparse file, or a link to no image of this tar: unpack and pack it again without"


def index_tar(data: WebDatasetConfig, path: str, *, name: str) -> Indexed:
    """Find the images in a tar.

    Raises:
        UsageError: it cannot be read to its end, or a label is none.
    """
    import pyarrow as pa

    paths: list[bytes] = []
    labels: list[int | None] = []
    places: list[tuple[int, int]] = []
    links: dict[int, str] = {}
    seen: dict[str, tuple[int, int]] = {}
    sample: bytes | None = None
    first = 0
    label: int | None = None
    num_bytes, modified_ns = look_at(path)
    with _open(path) as opened, _reading(path, opened) as file:
        for member in _members(file, path, seen):
            member_name = os.fsencode(member.name)
            folder, slash, base = member_name.rpartition(b"/")
            key, _, extension = base.partition(b".")
            kind = extension.decode("utf-8", "replace").lower()
            if folder + slash + key != sample:
                labels += [label] * (len(paths) - first)
                sample, first, label = folder + slash + key, len(paths), None
            if kind == data.label_extension:
                label = _read_label(opened, member.name, seen[member.name], path)
            elif kind in data.extensions or (
                not data.extensions and b"." + extension.lower().rpartition(b".")[2] in EXTENSIONS
            ):
                if member.issym():
                    links[len(paths)] = posixpath.join(posixpath.dirname(member.name), member.linkname)
                paths.append(os.fsencode(name) + b"/" + member_name)
                places.append(seen[member.name])
        labels += [label] * (len(paths) - first)
    if links:
        known = {posixpath.normpath(member_name): place for member_name, place in seen.items()}
        for number, target in links.items():
            places[number] = known.get(posixpath.normpath(target), NOWHERE)
    offsets, sizes = np.array(places, dtype=np.int64).reshape(-1, 2).T
    return Indexed(
        shard=Shard(path=path, num_bytes=num_bytes, modified_ns=modified_ns, groups=[len(paths)]),
        rows=pa.record_batch(
            {
                "path": pa.array(paths, type=pa.large_binary()),
                "label": as_labels(pa.array(labels, type=pa.int64()), f"data.label_extension={data.label_extension}"),
                "offset": pa.array(offsets),
                "size": pa.array(sizes),
            }
        ),
    )


def _open(path: str) -> io.BufferedReader:
    try:
        return object_store.open_file(path) if protocol_of(path) else open(path, "rb")
    except OSError as error:
        raise UsageError(f"data.urls must be readable, got {path!r} ({error.strerror or error}). Mend it.") from None


def _reading(path: str, opened: io.BufferedReader) -> tarfile.TarFile:
    try:
        # Bare tars alone: within compressed ones nothing can be found without reading all that comes before it.
        return tarfile.open(fileobj=opened, mode="r:", errors="surrogateescape", encoding="utf-8")
    except (tarfile.TarError, OSError, ValueError) as error:
        opened.seek(0)
        is_packed = opened.read(4)[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5")
        found = "a compressed one, which has no random access" if is_packed else str(error)
        raise UsageError(f"data.urls must be tars, got {path!r} ({found}). Mend or unpack it.") from None


def _members(file: tarfile.TarFile, path: str, seen: dict[str, tuple[int, int]]) -> Iterator[tarfile.TarInfo]:
    """The files of a tar, and links that may stand for some, to its proper end; `seen` learns where the last of a name
    lies."""
    try:
        while (member := file.next()) is not None:
            # It would keep them all.
            file.members = []  # type: ignore[attr-defined]
            place = NOWHERE
            if member.isreg() and not member.issparse():
                place = member.offset_data, member.size
            elif member.islnk():
                # It means the one before it, whatever of that name may come later.
                place = seen.get(member.linkname, NOWHERE)
            elif not (member.isreg() or member.issym()):
                continue
            seen[member.name] = place
            yield member
        # tarfile takes whatever it does not understand for the end.
        assert file.fileobj is not None
        file.fileobj.seek(file.offset)
        last = file.fileobj.read(tarfile.BLOCKSIZE)
        whole = last == bytes(tarfile.BLOCKSIZE)
        found = "no end, it was cut off" if len(last) < tarfile.BLOCKSIZE else "no header"
        if whole and _goes_on(file.fileobj):
            raise UsageError(
                f"data.urls must be single tars, got {path!r} (something follows its end at byte {file.offset:,})."
                " Join tars by tar --concatenate, or name each."
            )
    except MgpuError:
        raise
    except Exception as error:  # tarfile raises all kinds for what is broken
        whole, found = False, f"{type(error).__name__}: {error}"
    if not whole:
        raise UsageError(
            f"data.urls must be whole tars, got {path!r} ({found} at byte {file.offset:,}). Copy it again."
        )


def _goes_on(file: Any) -> bool:
    """Whether more than padding follows."""
    while content := file.read(io.DEFAULT_BUFFER_SIZE):
        if content.strip(b"\0"):
            return True
    return False


def _read_label(opened: io.BufferedReader, name: str, place: tuple[int, int], path: str) -> int:
    first, size = place
    opened.seek(first)
    text = opened.read(max(0, min(size, LABEL_BYTES)))
    try:
        if size > LABEL_BYTES:
            raise ValueError
        return int(text)
    except ValueError:
        raise UsageError(
            f"data.label_extension must name whole numbers, got {text!r} in {name!r} of {path!r}. Leave it out."
        ) from None


class TarSamples(ImageSamples):
    """Images in tars, read by where they lie."""

    def __init__(self, files: Listing) -> None:
        is_far = any(protocol_of(shard.path) for shard in files.shards)
        super().__init__(files, self._begin if is_far else None)
        self._stops = np.cumsum([shard.groups[0] for shard in files.shards])
        self._offsets, self._sizes = (files.table[name].chunk(0) for name in ("offset", "size"))
        self._tars = OpenShards(files.shards, lambda path: os.open(path, os.O_RDONLY | os.O_CLOEXEC), os.close)
        self._urls: OpenShards[str] = OpenShards(files.shards, str, lambda url: None)

    def _place(self, index: int) -> tuple[int, int, int]:
        """Which tar, the image's first byte in it, and how many there are.

        Raises:
            ValueError: its bytes lie nowhere.
        """
        size = self._sizes[index].as_py()
        if size < 0:
            raise ValueError(NO_BYTES)
        return int(np.searchsorted(self._stops, index, side="right")), self._offsets[index].as_py(), size

    def _begin(self, index: int) -> Future[bytes]:
        try:
            tar, first, size = self._place(index)
        except ValueError as error:
            nothing: Future[bytes] = Future()
            nothing.set_exception(error)
            return nothing
        return object_store.begin(self._urls[tar], first, first + size)

    def fetch(self, index: int) -> bytes:
        tar, first, size = self._place(index)
        data = os.pread(self._tars[tar], size, first)
        if len(data) < size:
            raise EOFError(f"the tar ends {size - len(data):,} bytes before this image does")
        return data
