"""Images in a column of Parquet files, read by whole row groups.

A row group is read once per rank, not once per loader worker: the worker that needs it first leaves its images in
memory that all workers of the rank share.
"""

import logging
import mmap
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from mgpu_ddp.config.checks import protocol_of
from mgpu_ddp.config.schema import ParquetConfig
from mgpu_ddp.data import object_store
from mgpu_ddp.data.archives import Indexed, OpenShards, look_at
from mgpu_ddp.data.encoded import ImageSamples
from mgpu_ddp.data.listing import Listing, Shard, as_labels
from mgpu_ddp.data.shared_memory import MAP_NORESERVE
from mgpu_ddp.errors import UsageError

log = logging.getLogger("mgpu_ddp")

SHARED_BYTES = 1 << 30
"""Address space for row groups that workers share; memory is taken for what is in use."""
MOST_SHARED = 256
LOCKS = 32


def index_parquet(data: ParquetConfig, path: str, *, name: str) -> Indexed:
    """Find the images in a Parquet file.

    Raises:
        UsageError: it cannot be read, or lacks a column.
    """
    import pyarrow as pa

    num_bytes, modified_ns = look_at(path)
    try:
        with _open(path) as file:
            image = _image_leaf(file.schema_arrow, data.column, path)
            rows = file.metadata.num_rows
            named = pa.array([b"%s/%d" % (os.fsencode(name), row) for row in range(rows)], type=pa.large_binary())
            keys = (
                named
                if data.key_column is None
                else _keys(_column(file, data.key_column, "data.key_column", path), named)
            )
            labels: Any = pa.nulls(rows, pa.int32())
            if data.label_column is not None:
                found = _column(file, data.label_column, "data.label_column", path)
                labels = as_labels(found, f"data.label_column={data.label_column} in {path!r}")
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            leaf = next(i for i in range(len(file.schema.names)) if file.schema.column(i).path == image)
            return Indexed(
                shard=Shard(
                    path=path,
                    num_bytes=num_bytes,
                    modified_ns=modified_ns,
                    groups=[group.num_rows for group in groups],
                    group_bytes=max((group.column(leaf).total_uncompressed_size for group in groups), default=0),
                ),
                rows=pa.record_batch({"path": keys, "label": labels}),
            )
    except (OSError, pa.ArrowException) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(
            f"data.urls must be readable Parquet files, got {path!r} ({' '.join(text.split())}). Mend it."
        ) from None


def _open(path: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Names need not be UTF-8.
    file = pa.PythonFile(object_store.RemoteFile(path), mode="r") if protocol_of(path) else pa.OSFile(os.fsencode(path))
    return pq.ParquetFile(file, pre_buffer=False, page_checksum_verification=True)


def _image_leaf(schema: Any, column: str, path: str) -> str:
    """The column of plain bytes that holds the images."""
    import pyarrow as pa

    remedy = f"Give data.column=NAME, one of {', '.join(schema.names)}."
    if (count := schema.names.count(column)) != 1:
        remedy = "Rename all but one." if count else remedy
        raise UsageError(f"data.column must be one column of every file, got {column!r} for {path!r}. {remedy}")
    kind = schema.field(column).type
    leaf = column
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind, leaf = kind.field("bytes").type, f"{column}.bytes"
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if plain not in (pa.binary(), pa.large_binary(), pa.binary_view()) and not pa.types.is_fixed_size_binary(plain):
        raise UsageError(f"data.column must hold bytes or a struct with bytes, got {kind} in {path!r}. {remedy}")
    return leaf


def _column(file: Any, name: str, key: str, path: str) -> Any:
    """One column, or one field of a struct, without reading any other."""
    top, *inner = [name] if name in file.schema_arrow.names else name.split(".")
    leaves = [file.schema.column(i).path for i in range(len(file.schema.names))]
    if leaves.count(name) != 1:
        shown = ", ".join(leaf for leaf in leaves if not leaf.endswith(".element"))
        raise UsageError(f"{key} must be one column of every file, got {name!r} for {path!r}. Give one of {shown}.")
    from pyarrow import compute

    table = file.read(columns=[name], use_threads=False)
    column = table.column(top)
    return (compute.struct_field(column, inner) if inner else column).combine_chunks()


def _keys(column: Any, named: Any) -> Any:
    """Keys as bytes; where one is null, the row's number will do."""
    import pyarrow as pa
    from pyarrow import compute

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_integer(column.type):
        column = column.cast(pa.string())
    try:
        return compute.coalesce(column.cast(pa.large_binary()), named)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise UsageError(
            f"data.key_column must hold text, bytes or whole numbers, got {column.type}. Leave it out."
        ) from None


def advise_block(files: Listing, block: int) -> None:
    """Say so where several ranks would each read all of a row group for some of its rows."""
    largest = max(rows for shard in files.shards for rows in shard.groups)
    if block < largest:
        text = "loader.block=%d deals the rows of one row group to several ranks, and each reads all of it: try %d"
        log.warning(text, block, 10 * largest)


class SharedGroups:
    """Row groups of images in memory that all workers of a rank share, in slots that are used again.

    A slot holds where its images end, int64 (rows,), which of them are null, uint8 (rows,), then their bytes.
    """

    def __init__(self, largest_bytes: int) -> None:
        self._slot_bytes = -(-largest_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._slots = min(MOST_SHARED, SHARED_BYTES // max(self._slot_bytes, 1))
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self._memory = np.frombuffer(mmap.mmap(-1, max(self._slots, 1) * max(self._slot_bytes, 1), flags), np.uint8)
        self._heads = np.frombuffer(mmap.mmap(-1, max(self._slots, 1) * 16, flags), np.int64).reshape(-1, 2)
        self._heads[:] = -1
        context = multiprocessing.get_context("fork")
        self._locks = [context.Lock() for _ in range(min(LOCKS, self._slots))]
        self._own: tuple[int, Any] = (-1, None)

    def get(self, group: int, row: int, read: Callable[[], Any]) -> bytes | None:
        """One image of a row group, which is read if it is in no slot. None where it is null."""
        if not self._slots:
            return self._image(group, row, read)
        slot = group % self._slots
        with self._locks[slot % len(self._locks)]:
            is_there = self._heads[slot, 0] == group
            if not is_there and (self._own[0] == group or not self._fill(slot, group, read)):
                return self._image(group, row, read)
            view = self._memory[slot * self._slot_bytes : (slot + 1) * self._slot_bytes]
            rows = int(self._heads[slot, 1])
            ends = view[: 8 * rows].view(np.int64)
            if view[8 * rows + row]:
                return None
            first = 9 * rows
            return view[first + (ends[row - 1] if row else 0) : first + ends[row]].tobytes()

    def _fill(self, slot: int, group: int, read: Callable[[], Any]) -> bool:
        """Put a row group into a slot; False where it is too large, as one with repeated images may be."""
        images = read()
        rows = len(images)
        ends, data = _parts(images)
        if 9 * rows + len(data) > self._slot_bytes:
            self._own = (group, images)
            return False
        self._heads[slot] = -1
        view = self._memory[slot * self._slot_bytes : (slot + 1) * self._slot_bytes]
        view[: 8 * rows].view(np.int64)[:] = ends
        view[8 * rows : 9 * rows] = np.asarray(images.is_null(), dtype=np.uint8)
        view[9 * rows : 9 * rows + len(data)] = data
        self._heads[slot] = group, rows
        return True

    def _image(self, group: int, row: int, read: Callable[[], Any]) -> bytes | None:
        if self._own[0] != group:
            self._own = (group, read())
        image: bytes | None = self._own[1][row].as_py()
        return image


def _parts(images: Any) -> tuple[Any, Any]:
    """Where each of an array of images ends, from the first, and the bytes of all."""
    import pyarrow as pa

    wide = pa.types.is_large_binary(images.type)
    ends = np.frombuffer(images.buffers()[1], np.int64 if wide else np.int32)[images.offset :][: len(images) + 1]
    data = np.frombuffer(images.buffers()[2] or b"", np.uint8)[ends[0] : ends[-1]]
    return ends[1:] - ends[0], data


class ParquetSamples(ImageSamples):
    """Images in the row groups of Parquet files."""

    def __init__(self, files: Listing, column: str) -> None:
        super().__init__(files)
        self._column = column
        groups = [
            (number, group, rows)
            for number, shard in enumerate(files.shards)
            for group, rows in enumerate(shard.groups)
        ]
        self._places = [(number, group) for number, group, _ in groups]
        self._stops = np.cumsum([rows for _, _, rows in groups])
        self._files: OpenShards[Any] = OpenShards(files.shards, _open, lambda file: file.close(force=True))
        self._groups = SharedGroups(max(shard.group_bytes + 9 * max(shard.groups, default=0) for shard in files.shards))
        self._broken: dict[int, str] = {}

    def fetch(self, index: int) -> bytes:
        number = int(np.searchsorted(self._stops, index, side="right"))
        row = index - (int(self._stops[number - 1]) if number else 0)
        image = self._groups.get(number, row, lambda: self._read(number))
        if image is None:
            raise ValueError("null in the place of an image")
        return image

    def _read(self, number: int) -> Any:
        """The images of a row group."""
        import pyarrow as pa
        from pyarrow import compute

        if number in self._broken:
            raise OSError(self._broken[number])
        shard, group = self._places[number]
        file = self._files[shard]
        leaf = _image_leaf(file.schema_arrow, self._column, "")
        try:
            column = file.read_row_group(group, columns=[leaf], use_threads=False).column(0)
        except (OSError, pa.ArrowException) as error:
            # Its other rows need not try.
            self._broken[number] = f"row group {group} cannot be read ({error})"
            raise OSError(self._broken[number]) from None
        images = column if leaf == self._column else compute.struct_field(column, "bytes")
        if images.type not in (pa.binary(), pa.large_binary()):
            images = images.cast(pa.large_binary())
        return pa.concat_arrays(images.chunks) if images.num_chunks != 1 else images.chunk(0)
