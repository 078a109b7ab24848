"""The listing: index → path and label of every image, written once by rank 0 and memory-mapped by every process.

`listing.arrow` is an Arrow IPC file with the columns `path` (raw bytes relative to the root, since names need not be
UTF-8) and `label` (int32, or null). It alone defines which index is which image. A folder's is sorted by the bytes of
the path, and images that a later start finds besides are appended; other sources have an order of their own.

Where archives hold the images, the metadata lists the archives. For tars, the columns `offset` and `size` (int64) say
where in its tar each image lies. Where labels are texts, the metadata lists them, in the order of their numbers.

For files of their own, `bytes` and `modified_ns`, or `sha256`, tell what each image was when it was listed last, null
where that is not known. Rows are predicted from this content or from later one, so that a file which differs has to be
predicted again.

`data.carry` adds to the metadata the types of what it carries, and in a list's listing a column `carried/NAME` each.
"""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mgpu_ddp.data.carried import from_text, to_text
from mgpu_ddp.errors import UsageError

log = logging.getLogger("mgpu_ddp")

FILE_NAME = "listing.arrow"
ARCHIVES_KEY = "shards"
"""Names archives in the metadata. They were called shards once, and the run folders of that time must stay readable."""
NAMES_KEY = "label_names"
CONTENT = ("bytes", "modified_ns", "sha256")
"""The columns that tell one content of a file from another."""
CARRIED_KEY = "carried"
"""Holds the schema of what is carried, in the metadata."""
CARRIED = "carried/"
"""Begins the names of columns that are carried."""

Integers = npt.NDArray[np.int64]


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """A file that holds many images (a tar, or a Parquet file), as it was when they were listed."""

    path: str
    num_bytes: int
    modified_ns: int
    groups: list[int]
    """The number of images in each row group; of a tar, in the whole file."""
    boxes: list[int] | None = None
    """The number of their boxes, where samples are these."""
    group_bytes: int = 0
    """The bytes of the images in the largest row group."""
    left_out: dict[str, int] = field(default_factory=dict)
    """How many of its images are not listed, by kind."""
    carried_bytes: int = 0
    """The bytes of the columns that are carried."""

    @property
    def rows(self) -> list[int]:
        """The number of rows of the listing for each row group."""
        return self.groups if self.boxes is None else self.boxes


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
        names = metadata.get(NAMES_KEY.encode())
        self.label_names: list[str] | None = None if names is None else json.loads(names)
        """The texts that were given for labels, in the order of their numbers."""
        self.carried: Any = from_text(metadata.get(CARRIED_KEY.encode(), b""))
        """The schema of the columns that are carried into the rows."""
        self.refreshed = False
        """It replaces a listing whose archives or files have changed."""
        self.changed: Integers = np.empty(0, np.int64)
        """Rows whose files have changed since they were listed last."""
        self.left_out: dict[str, int] = {}
        """How many files are not listed, by kind; of a listing that was just made."""
        # There is one record batch, so a lookup is one step into mapped memory.
        self._paths = table.column("path").chunk(0)
        self._labels = table.column("label").chunk(0)
        self.boxes: npt.NDArray[np.float64] | None = None
        """(rows, 4), where samples are boxes of images."""
        self._box = table["box"].chunk(0) if "box" in table.column_names else None
        if self._box is not None:
            self.boxes = self._box.flatten().to_numpy().reshape(-1, 4)
        if self.label_names is not None:
            self._check_names(self.label_names)

    def _check_names(self, names: Any) -> None:
        from pyarrow import compute

        largest = compute.max(self._labels).as_py()
        if (
            type(names) is not list
            or not all(type(name) is str for name in names)
            or (largest is not None and largest >= len(names))
        ):
            raise ValueError("its labels have no names")

    @classmethod
    def build(cls, paths: list[bytes], **content: Any) -> "Listing":
        """The listing of a folder's images."""
        import pyarrow as pa

        labels, _names = class_labels(paths)
        return cls.of(
            pa.array(paths, type=pa.large_binary()),
            pa.array(labels if labels is not None else [None] * len(paths), type=pa.int32()),
            **content,
        )

    @classmethod
    def of(
        cls,
        path: Any,
        label: Any,
        *,
        archives: list[Archive] | None = None,
        label_names: list[str] | None = None,
        carried: Any = None,
        **places: Any,
    ) -> "Listing":
        """A listing of Arrow arrays: large_binary, int32, and as `places` offset and size (int64), or `CONTENT`.

        `carried` is the schema of what is carried; `places` also has its columns, where the listing keeps them.
        """
        import pyarrow as pa

        sink = pa.BufferOutputStream()
        metadata = {ARCHIVES_KEY: json.dumps([asdict(each) for each in archives])} if archives is not None else {}
        if label_names is not None:
            metadata[NAMES_KEY] = json.dumps(label_names)
        if carried:
            metadata[CARRIED_KEY] = to_text(carried)
        batch = pa.record_batch({"path": path, "label": label, **places}, metadata=metadata or None)
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

    def carried_of(self, indices: npt.NDArray[np.int64]) -> dict[str, Any]:
        """The values of these rows that the listing keeps, an Arrow array for each column that is carried."""
        import pyarrow as pa

        return {name: self.table[CARRIED + name].chunk(0).take(pa.array(indices)) for name in self.carried.names}

    @property
    def carried_bytes(self) -> int:
        """About how many bytes are carried into a row."""
        kept: int = sum(column.nbytes for column in self._kept().values())
        return (kept + sum(archive.carried_bytes for archive in self.archives)) // max(len(self), 1)

    def _kept(self) -> dict[str, Any]:
        """The columns that are carried, by their names here."""
        names = [name for name in self.table.column_names if name.startswith(CARRIED)]
        return {name: self.table[name].chunk(0) for name in names}

    def label(self, index: int) -> int:
        """The class number, -1 where there are no classes."""
        value = self._labels[index].as_py()
        return -1 if value is None else int(value)

    def digest(self, stop: int) -> str:
        """sha256 over paths, labels, the names of these, and boxes: of the first `stop` rows, or of all."""
        stop = min(stop, len(self))
        paths, labels = self._paths.slice(0, stop), self._labels.slice(0, stop)
        ends = np.frombuffer(paths.buffers()[1], np.int64, stop + 1) if stop else np.zeros(1, np.int64)
        digest = hashlib.sha256(np.diff(ends).tobytes())
        digest.update(memoryview(paths.buffers()[2] or b"")[: int(ends[-1])])
        digest.update(labels.fill_null(-1).to_numpy())
        if self.boxes is not None:
            digest.update(self.boxes[:stop].data)
        if self.label_names is not None:
            used = labels.drop_null().unique().to_pylist()
            digest.update(json.dumps([self.label_names[label] for label in used]).encode())
        return digest.hexdigest()

    def grown(self, found: list[bytes], **content: Any) -> "Listing":
        """Append the paths that this listing lacks; what it has keeps its index and its label.

        `content` are the columns that tell the content of what was found.
        """
        import pyarrow as pa
        from pyarrow import compute

        seen = pa.array(found, type=pa.large_binary())
        place = compute.index_in(seen, value_set=self._paths)
        new = np.flatnonzero(place.is_null().to_numpy(zero_copy_only=False))
        known = np.flatnonzero(place.is_valid().to_numpy(zero_copy_only=False))
        numbers = self.classes()
        labels: list[int | None] = []
        for path in seen.take(pa.array(new)).to_pylist():
            is_class = numbers and path.count(b"/") == 1
            labels.append(numbers.setdefault(path.partition(b"/")[0], len(numbers)) if is_class else None)
        found_at = np.full(len(self) + len(new), -1)
        found_at[place.drop_null().to_numpy()] = known
        found_at[len(self) :] = new
        return self._updated(
            found_at,
            content,
            path=pa.concat_arrays([self._paths, seen.take(pa.array(new))]),
            label=pa.concat_arrays([self._labels, pa.array(labels, type=pa.int32())]),
        )

    def checked(self, start: int, content: dict[str, Any]) -> "Listing":
        """This listing, with the content that some of its files have now: those from `start` on."""
        found_at = np.full(len(self), -1)
        count = len(next(iter(content.values()), ()))
        found_at[start : start + count] = np.arange(count)
        return self._updated(found_at, content, path=self._paths, label=self._labels)

    def after(self, known: "Listing") -> "Listing":
        """This listing, compared row by row with an earlier one of the same images, whose carried values stay."""
        import pyarrow as pa

        if len(self) < len(known) or not self.carried.equals(known.carried):
            return self
        kept = {}
        for name, column in self._kept().items():
            before = known.table[name].chunk(0)
            if not column.slice(0, len(known)).equals(before):
                log.warning(
                    "data.carry: %r has other values than when the job began, whose rows keep theirs",
                    name.removeprefix(CARRIED),
                )
            kept[name] = pa.concat_arrays([before, column.slice(len(known))])
        content = {name: self.table[name].combine_chunks() for name in CONTENT if name in self.table.column_names}
        columns = {"path": self._paths, "label": self._labels, "label_names": self.label_names}
        columns |= {"carried": self.carried, **kept}
        columns |= {"box": self._box} if self._box is not None else {}
        updated = known._updated(np.arange(len(self)), content, **columns)
        updated.left_out = self.left_out
        return updated

    def _updated(self, found_at: Integers, content: dict[str, Any], **columns: Any) -> "Listing":
        """A listing that begins with the rows of this one; row i was found as number found_at[i], or not (-1)."""
        import pyarrow as pa
        from pyarrow import compute

        count, changed = len(self), np.zeros(len(self), np.bool_)
        listed = {"path": self._paths, "label": self._labels, "box": self._box}
        is_new = any(columns.get(name) != column for name, column in listed.items())
        updated = {name: self.table[name].combine_chunks() for name in CONTENT if name in self.table.column_names}
        for name, now in content.items():
            before = updated.get(name, pa.nulls(count, now.type))
            is_known = np.append(now.is_valid().to_numpy(zero_copy_only=False), False)[found_at]
            both = pa.concat_arrays([before, now])
            rows = np.where(is_known, count + found_at, np.arange(len(found_at)))
            updated[name] = both.take(pa.array(rows, mask=~is_known & (rows >= count)))
            after = updated[name].slice(0, count)
            changed |= compute.not_equal(before, after).fill_null(False).to_numpy(zero_copy_only=False)
            is_new = is_new or not before.equals(after)
        if not is_new:
            return self
        for name in updated.keys() - content.keys():
            updated[name] = pa.concat_arrays([updated[name], pa.nulls(len(found_at) - count, updated[name].type)])
        listing = Listing.of(**columns, **updated)
        listing.refreshed = True
        listing.changed = np.flatnonzero(changed)
        return listing

    def classes(self) -> dict[bytes, int]:
        """Map class folders to their numbers; empty where folders are not classes."""
        import pyarrow as pa

        table = pa.table({"path": self._paths, "label": self._labels}).filter(self._labels.is_valid())
        firsts = table.group_by("label", use_threads=False).aggregate([("path", "first")])
        pairs = zip(firsts["path_first"].to_pylist(), firsts["label"].to_pylist(), strict=True)
        return {path.partition(b"/")[0]: number for path, number in pairs}
