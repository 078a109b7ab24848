"""The listing: index → path and label of every image, written once by rank 0 and memory-mapped by every process.

`listing.arrow` is an Arrow IPC file with the columns `path` (raw bytes relative to the root, since names need not be
UTF-8) and `label` (int32, or null). It alone defines which index is which image. A folder's is sorted by the bytes of
the path, and images that a later start finds besides are appended; other sources have an order of their own.

Where archives hold the images, the metadata lists the archives. For tars, the columns `offset` and `size` (int64) say
where in its tar each image lies.
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
ARCHIVES_KEY = "shards"
"""Names archives in the metadata. They were called shards once, and the run folders of that time must stay readable."""


def is_image(name: bytes) -> bool:
    return name.lower().endswith(EXTENSIONS)


def class_labels(paths: list[bytes]) -> tuple[list[int] | None, list[str]]:
    """Labels and class names where every image lies in exactly one level of folders; else (None, [])."""
    if not paths or any(path.count(b"/") != 1 for path in paths):
        return None, []
    folders = [path.partition(b"/")[0] for path in paths]
    numbers = {folder: number for number, folder in enumerate(sorted(set(folders)))}
    return [numbers[folder] for folder in folders], [readable(folder) for folder in numbers]


def readable(path: bytes) -> str:
    r"""A path as text that every format can hold: bytes that are not UTF-8 become the text \udcXX."""
    return path.decode("utf-8", "surrogateescape").encode("utf-8", "backslashreplace").decode("utf-8")


def no_names(count: int) -> Any:
    """An Arrow array of strings that are all null, for images without names."""
    import pyarrow as pa

    return pa.nulls(count, pa.string())


def as_labels(column: Any, what: str) -> Any:
    """Convert an Arrow column to class numbers, int32, null where they are null or negative.

    Raises:
        UsageError: they are not whole numbers, or too large. The message begins with `what`.
    """
    import pyarrow as pa
    from pyarrow import compute

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_floating(column.type):
        # pandas writes whole numbers as floats where some are missing.
        column = column.cast(pa.float64())
        column = compute.if_else(compute.is_nan(column), None, column)
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type) or pa.types.is_null(column.type)):
        raise UsageError(
            f"{what} holds {column.type}, not whole numbers. Number the classes from 0, or leave the labels out."
        )
    try:
        labels = column.cast(pa.int32())
    except pa.ArrowInvalid as error:
        raise UsageError(f"{what} holds no class numbers: {error}. Number the classes from 0.") from None
    return compute.if_else(compute.less(labels, 0), pa.scalar(None, pa.int32()), labels)


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """A file that holds many images (a tar, or a Parquet file), as it was when they were listed."""

    path: str
    num_bytes: int
    modified_ns: int
    groups: list[int]
    """The number of images in each row group; of a tar, in the whole file."""
    group_bytes: int = 0
    """The bytes of the images in the largest row group."""


class Listing:
    """An Arrow table of paths and labels, in memory or memory-mapped."""

    def __init__(self, buffer: Any) -> None:
        import pyarrow as pa

        self.buffer = buffer
        self.table = table = pa.ipc.open_file(buffer).read_all()
        # An offset that leads out of the buffer would end the process.
        table.validate(full=True)
        kinds = table["path"].type, table["label"].type, table["path"].num_chunks
        if kinds != (pa.large_binary(), pa.int32(), 1):
            raise TypeError("paths in one batch, with labels, are expected, got {} and {} in {}".format(*kinds))
        metadata = table.schema.metadata or {}
        self.archives = [Archive(**each) for each in json.loads(metadata.get(ARCHIVES_KEY.encode(), b"[]"))]
        """In the order of the rows; none where each image is a file of its own."""
        self.refreshed = False
        """It replaces a listing whose archives have changed."""
        # There is one record batch, so a lookup is one step into mapped memory.
        self._paths = table.column("path").chunk(0)
        self._labels = table.column("label").chunk(0)

    @classmethod
    def build(cls, paths: list[bytes]) -> "Listing":
        """The listing of a folder's images."""
        import pyarrow as pa

        labels, _names = class_labels(paths)
        return cls.of(
            pa.array(paths, type=pa.large_binary()),
            pa.array(labels if labels is not None else [None] * len(paths), type=pa.int32()),
        )

    @classmethod
    def of(cls, path: Any, label: Any, *, archives: list[Archive] | None = None, **places: Any) -> "Listing":
        """A listing of Arrow arrays: large_binary, int32 and, for tars, the `places` offset and size, int64."""
        import pyarrow as pa

        sink = pa.BufferOutputStream()
        metadata = {ARCHIVES_KEY: json.dumps([asdict(each) for each in archives])} if archives is not None else None
        batch = pa.record_batch({"path": path, "label": label, **places}, metadata=metadata)
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return cls(sink.getvalue())

    @classmethod
    def open(cls, path: Path) -> "Listing":
        """Map a listing.

        Raises:
            UsageError: it is damaged.
        """
        import pyarrow as pa

        try:
            with pa.memory_map(str(path)) as mapped:
                return cls(mapped.read_buffer())
        except (OSError, pa.ArrowException, IndexError, KeyError, TypeError, ValueError) as error:
            text = " ".join(str(error).split())
            raise UsageError(
                f"{path} cannot be read ({text}): it is the listing this job began with. Choose another output.dir."
            ) from None

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> bytes:
        return bytes(self._paths[index].as_buffer())

    def names(self, indices: npt.NDArray[np.int64]) -> Any:
        """The paths of these rows as `readable` makes them, an Arrow array of strings."""
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
        """sha256 over the paths and labels of the first `stop` rows, or of as many as there are."""
        stop = min(stop, len(self))
        paths, labels = self._paths.slice(0, stop), self._labels.slice(0, stop)
        ends = np.frombuffer(paths.buffers()[1], np.int64, stop + 1) if stop else np.zeros(1, np.int64)
        digest = hashlib.sha256(np.diff(ends).tobytes())
        digest.update(memoryview(paths.buffers()[2] or b"")[: int(ends[-1])])
        digest.update(labels.fill_null(-1).to_numpy())
        return digest.hexdigest()

    def grown(self, found: list[bytes]) -> "Listing":
        """Append the paths that this listing lacks; what it has keeps its index and its label."""
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
        """Map class folders to their numbers; empty where folders are not classes."""
        import pyarrow as pa

        table = pa.table({"path": self._paths, "label": self._labels}).filter(self._labels.is_valid())
        firsts = table.group_by("label", use_threads=False).aggregate([("path", "first")])
        pairs = zip(firsts["path_first"].to_pylist(), firsts["label"].to_pylist(), strict=True)
        return {path.partition(b"/")[0]: number for path, number in pairs}
