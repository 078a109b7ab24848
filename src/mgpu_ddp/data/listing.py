"""The listing of an image folder: index → path and label, written once by rank 0 and mapped by every process.

`listing.arrow` is an Arrow IPC file with the columns `path` (raw bytes relative to the root, since names need
not be UTF-8) and `label` (int32, null where folders are not classes). It is sorted by the bytes of the path;
what a later start finds besides is appended. It alone defines which index is which file.

Other sources list the names of their images in an order of their own. Where many images lie in one file, the metadata
says which files these are, and for tars the columns `offset` and `size` (int64) where in its file each image lies.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mgpu_ddp.errors import UsageError

EXTENSIONS = (b".jpg", b".jpeg", b".png", b".bmp", b".gif", b".webp", b".tif", b".tiff")
FILE_NAME = "listing.arrow"


def is_image(name: bytes) -> bool:
    return name.lower().endswith(EXTENSIONS)


def class_labels(paths: list[bytes]) -> tuple[list[int] | None, list[str]]:
    """Labels and class names where every image sits in exactly one level of folders; else (None, [])."""
    if not paths or any(path.count(b"/") != 1 for path in paths):
        return None, []
    folders = [path.partition(b"/")[0] for path in paths]
    numbers = {folder: number for number, folder in enumerate(sorted(set(folders)))}
    return [numbers[folder] for folder in folders], [readable(folder) for folder in numbers]


def readable(path: bytes) -> str:
    r"""A path as text that every format can hold: bytes that are not UTF-8 become \udcXX, as surrogateescape has it."""
    return path.decode("utf-8", "surrogateescape").encode("utf-8", "backslashreplace").decode("utf-8")


def no_names(count: int) -> Any:
    """In the place of names, where images have none: an Arrow array of strings."""
    import pyarrow as pa

    return pa.nulls(count, pa.string())


def as_labels(column: Any, what: str) -> Any:
    """Arrow values as class numbers, int32; null where they are null or negative, as some data sets have it.

    Raises:
        UsageError: they are no whole numbers, or too large.
    """
    import pyarrow as pa
    from pyarrow import compute

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_floating(column.type):
        # Where some are missing, pandas makes floats of the others.
        column = column.cast(pa.float64())
        column = compute.if_else(compute.is_nan(column), None, column)
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type) or pa.types.is_null(column.type)):
        raise UsageError(
            f"{what} must hold whole numbers, got {column.type}. Number the classes from 0, or leave it out."
        )
    try:
        labels = column.cast(pa.int32())
    except pa.ArrowInvalid as error:
        raise UsageError(f"{what} must hold class numbers, got: {error}. Number them from 0.") from None
    return compute.if_else(compute.less(labels, 0), pa.scalar(None, pa.int32()), labels)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A file that holds many images, as it was when they were listed."""

    path: str
    num_bytes: int
    modified_ns: int
    groups: list[int]
    """Images of each of its row groups, or of the whole file."""
    group_bytes: int = 0
    """Of the images in its largest row group."""


class Listing:
    """An Arrow table of paths and labels, in memory or memory-mapped."""

    def __init__(self, buffer: Any) -> None:
        import pyarrow as pa

        self.buffer = buffer
        self.table = table = pa.ipc.open_file(buffer).read_all()
        self.shards = [Shard(**shard) for shard in json.loads((table.schema.metadata or {}).get(b"shards", b"[]"))]
        """The files in which the images lie, in the order of the rows."""
        self.refreshed = False
        """Whether it takes the place of a listing whose files have changed."""
        # One record batch: every lookup is one step into mapped memory.
        self._paths = table.column("path").chunk(0)
        self._labels = table.column("label").chunk(0)

    @classmethod
    def build(cls, paths: list[bytes]) -> "Listing":
        import pyarrow as pa

        labels, _names = class_labels(paths)
        return cls.of(
            pa.array(paths, type=pa.large_binary()),
            pa.array(labels if labels is not None else [None] * len(paths), type=pa.int32()),
        )

    @classmethod
    def of(cls, path: Any, label: Any, *, shards: list[Shard] | None = None, **places: Any) -> "Listing":
        """A listing of Arrow arrays: large_binary and int32; `places`: `offset` and `size` where they are needed."""
        import pyarrow as pa

        sink = pa.BufferOutputStream()
        metadata = {"shards": json.dumps([asdict(shard) for shard in shards])} if shards is not None else None
        batch = pa.record_batch({"path": path, "label": label, **places}, metadata=metadata)
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return cls(sink.getvalue())

    @classmethod
    def open(cls, path: Path) -> "Listing":
        import pyarrow as pa

        try:
            with pa.memory_map(str(path)) as mapped:
                return cls(mapped.read_buffer())
        except (OSError, pa.ArrowException, IndexError, KeyError, TypeError, ValueError) as error:
            text = " ".join(str(error).split())
            raise UsageError(
                f"{path} must be the listing this job began with, got a file that cannot be read ({text})."
                " Choose another output.dir."
            ) from None

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> bytes:
        return bytes(self._paths[index].as_buffer())

    def names(self, indices: npt.NDArray[np.int64]) -> Any:
        """These paths as `readable` makes them, an Arrow array of strings."""
        import pyarrow as pa

        paths = self._paths.take(pa.array(indices))
        try:
            return paths.cast(pa.string())
        except pa.ArrowInvalid:
            return pa.array(map(readable, paths.to_pylist()), type=pa.string())

    def label(self, index: int) -> int:
        """The class number, -1 where there are no classes."""
        value = self._labels[index].as_py()
        return -1 if value is None else int(value)

    def digest(self, stop: int) -> str:
        """sha256 over the paths and labels of the first `stop` rows."""
        paths, labels = self._paths.slice(0, stop), self._labels.slice(0, stop)
        ends = np.frombuffer(paths.buffers()[1], np.int64, stop + 1) if stop else np.zeros(1, np.int64)
        digest = hashlib.sha256(np.diff(ends).tobytes())
        digest.update(memoryview(paths.buffers()[2] or b"")[: int(ends[-1])])
        digest.update(labels.fill_null(-1).to_numpy())
        return digest.hexdigest()

    def grown(self, found: list[bytes]) -> "Listing":
        """This listing with the paths that it lacks appended; what it has keeps its index and its label."""
        import pyarrow as pa
        from pyarrow import compute

        seen = pa.array(found, type=pa.large_binary())
        new = seen.filter(compute.invert(compute.is_in(seen, value_set=self._paths))).to_pylist()
        if not new:
            return self
        numbers = self.classes()
        labels: list[int | None] = []
        for path in new:
            is_class = numbers and path.count(b"/") == 1
            labels.append(numbers.setdefault(path.partition(b"/")[0], len(numbers)) if is_class else None)
        return Listing.of(
            pa.concat_arrays([self._paths, pa.array(new, type=pa.large_binary())]),
            pa.concat_arrays([self._labels, pa.array(labels, type=pa.int32())]),
        )

    def classes(self) -> dict[bytes, int]:
        """The class folders with their numbers; none where folders are not classes."""
        import pyarrow as pa

        table = pa.table({"path": self._paths, "label": self._labels}).filter(self._labels.is_valid())
        firsts = table.group_by("label", use_threads=False).aggregate([("path", "first")])
        pairs = zip(firsts["path_first"].to_pylist(), firsts["label"].to_pylist(), strict=True)
        return {path.partition(b"/")[0]: number for path, number in pairs}
