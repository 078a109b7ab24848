"""Images in a column of Parquet files, read by whole row groups, each once per rank."""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from mgpu_ddp.config.checks import protocol_of, require
from mgpu_ddp.config.schema import Config, ParquetConfig
from mgpu_ddp.data import object_store
from mgpu_ddp.data.archives import ArchiveIndex, OpenArchives, index_archives, size_and_mtime, unreadable
from mgpu_ddp.data.boxes import WITHOUT, as_lists, read_boxes
from mgpu_ddp.data.carried import find_columns, to_text
from mgpu_ddp.data.encoded import EncodedSamples
from mgpu_ddp.data.input_file import require_input
from mgpu_ddp.data.labels import as_labels, as_names, is_text
from mgpu_ddp.data.listing import CARRIED_KEY, Archive, Listing
from mgpu_ddp.data.row_group_cache import RowGroupCache, slot_bytes
from mgpu_ddp.distributed.host import available_bytes, require_memory
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import StateError, UsageError

log = logging.getLogger("mgpu_ddp")


def list_parquet(config: Config, known: Listing | None, world: World) -> Listing | None:
    """List the images of all Parquet files, on rank 0. Collective: every rank calls this.

    Raises:
        UsageError: a file is missing, broken, or lacks a column.
    """
    data: ParquetConfig = config.data
    is_same = known is None or (known.boxes is None) == (data.box_column is None)
    if known is not None and (known.carried.names != data.carry or not is_same):
        # Another job's, which will be refused.
        known = None
    files = index_archives(data.urls, partial(index_parquet, data), known, world, check=data.check)
    if files is not None and config.collect == "gather" and world.size > 1 and not config.boxes:
        advise_block(files, config.loader.block)
    return files


def advise_block(files: Listing, block: int) -> None:
    """Warn where several ranks would each read all of a row group for some of its rows."""
    largest = max(rows for archive in files.archives for rows in archive.groups)
    if block < largest:
        text = "loader.block=%d deals the rows of one row group to several ranks, and each reads all of it: try %d"
        log.warning(text, block, 10 * largest)


def index_parquet(data: ParquetConfig, path: str, name: str) -> ArchiveIndex:
    """Find the images in a Parquet file.

    Raises:
        UsageError: it cannot be read, or lacks a column.
    """
    import pyarrow as pa

    num_bytes, modified_ns = size_and_mtime(path)
    try:
        with _open(path) as file:
            leaf = _leaves(file).index(_image_leaf(file.schema_arrow, data.column, path))
            carried = _carried_schema(file.schema_arrow, data.carry, repr(path))
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            if sum(group.num_rows for group in groups) != file.metadata.num_rows:
                raise unreadable(path, ValueError("its row groups have not as many rows as it says"))
            index = ArchiveIndex(
                archive=Archive(
                    path=path,
                    num_bytes=num_bytes,
                    modified_ns=modified_ns,
                    groups=[group.num_rows for group in groups],
                    group_bytes=max((group.column(leaf).total_uncompressed_size for group in groups), default=0),
                    carried_bytes=_num_bytes(file, data.carry),
                ),
                rows=pa.record_batch(
                    {"path": _keys(file, data, path, name), "label": _labels(file, data, path)},
                    metadata={CARRIED_KEY: to_text(carried)},
                ),
            )
            return index if data.box_column is None else _boxes_of(index, file, data.box_column)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise unreadable(path, error) from None


def _boxes_of(images: ArchiveIndex, file: Any, names: list[str]) -> ArchiveIndex:
    """The index with a row for each box of an image."""
    import pyarrow as pa

    archive, given = images.archive, file.schema_arrow.names
    for name in names:
        rule = f"one column of every file, among {', '.join(given)}"
        require(given.count(name) == 1, "data.box_column", rule, f"{name} for {archive.path}", "Name one of them.")
    table = file.read(columns=names, use_threads=False)
    columns = [table[name] for name in names]
    counts, boxes = read_boxes(columns, lambda row: f"row {row} of {archive.path!r}")
    stops = np.cumsum(archive.groups, dtype=np.int64)
    before = np.concatenate([[0], np.cumsum(counts)])
    of_images = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(counts)) - np.repeat(stops - archive.groups, archive.groups)
    without = int((counts == 0).sum())
    return ArchiveIndex(
        archive=replace(
            archive,
            boxes=np.diff(before[np.concatenate([[0], stops])]).tolist(),
            left_out={WITHOUT: without} if without else {},
        ),
        rows=pa.record_batch(
            {
                **{name: images.rows[name].take(pa.array(of_images)) for name in images.rows.schema.names},
                "box": as_lists(counts, boxes).flatten(),
                "row": pa.array(within[of_images]),
            },
            metadata=images.rows.schema.metadata,
        ),
    )


def _open(path: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if protocol_of(path):
        file = pa.PythonFile(object_store.RemoteFile(path), mode="r")
    else:
        require_input(path)
        # Names need not be UTF-8.
        file = pa.OSFile(os.fsencode(path))
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
        raise UsageError(
            f"data.column must be a column of bytes or of a struct with bytes, got {kind} in {path!r}. {remedy}"
        )
    return leaf


def _leaves(file: Any) -> list[str]:
    """The paths of all columns without inner ones."""
    return [file.schema.column(number).path for number in range(len(file.schema.names))]


def _column(file: Any, name: str, key: str, path: str) -> Any:
    """Read one column, or one field of a struct, and no other."""
    from pyarrow import compute

    leaves = _leaves(file)
    if leaves.count(name) != 1:
        shown = ", ".join(leaf for leaf in leaves if not leaf.endswith(".element"))
        raise UsageError(f"{key} must be one column of every file, got {name!r} for {path!r}. Give one of {shown}.")
    top, *inner = [name] if name in file.schema_arrow.names else name.split(".")
    column = file.read(columns=[name], use_threads=False).column(top)
    return (compute.struct_field(column, inner) if inner else column).combine_chunks()


def _carried_schema(schema: Any, carry: Sequence[str], where: str) -> Any:
    """The types of the columns that `data.carry` names, by these names; of a dictionary that of its values."""
    import pyarrow as pa

    kinds = [schema.field(name).type for name in find_columns(schema.names, carry, where)]
    kinds = [kind.value_type if pa.types.is_dictionary(kind) else kind for kind in kinds]
    return pa.schema([pa.field(name, kind) for name, kind in zip(carry, kinds, strict=True)])


def _num_bytes(file: Any, carry: Sequence[str]) -> int:
    """The bytes of the columns that `data.carry` names."""
    names = find_columns(file.schema_arrow.names, carry, "")
    mine = [number for number, leaf in enumerate(_leaves(file)) if leaf in names or leaf.partition(".")[0] in names]
    groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
    return sum(group.column(number).total_uncompressed_size for group in groups for number in mine)


def _labels(file: Any, data: ParquetConfig, path: str) -> Any:
    """The rows' labels: int32, or names that are numbered once those of all files are known."""
    import pyarrow as pa

    if data.label_column is None:
        return pa.nulls(file.metadata.num_rows, pa.int32())
    column = _column(file, data.label_column, "data.label_column", path)
    if is_text(column.type):
        return as_names(column)
    return as_labels(column, f"data.label_column={data.label_column} in {path!r}")


def _keys(file: Any, data: ParquetConfig, path: str, name: str) -> Any:
    """The rows' names as bytes: their keys, or file and row number where there is none."""
    import pyarrow as pa
    from pyarrow import compute

    count = file.metadata.num_rows
    require_memory("data.urls", repr(path), count * (len(name) + 20), available_bytes(), "Split the file.")
    rows = pa.array(np.arange(count)).cast(pa.large_string()).cast(pa.large_binary())
    file_name, slash = (pa.scalar(text, pa.large_binary()) for text in (os.fsencode(name), b"/"))
    numbered = compute.binary_join_element_wise(file_name, rows, slash)
    if data.key_column is None:
        return numbered
    column = _column(file, data.key_column, "data.key_column", path)
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_integer(column.type):
        column = column.cast(pa.string())
    try:
        return compute.coalesce(column.cast(pa.large_binary()), numbered)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        rule = "a column of text, bytes or whole numbers"
        raise UsageError(
            f"data.key_column must be {rule}, got {column.type} in {path!r}. Leave it out, or give another."
        ) from None


class ParquetSamples(EncodedSamples):
    """Images in the row groups of Parquet files."""

    def __init__(self, files: Listing, column: str) -> None:
        super().__init__(files)
        self._column = column
        groups = [
            (number, group, rows)
            for number, archive in enumerate(files.archives)
            for group, rows in enumerate(archive.rows)
        ]
        self._places = [(number, group) for number, group, _ in groups]
        """The file and the number in it of each row group."""
        self._stops = np.cumsum([rows for _, _, rows in groups])
        self._rows = files.table["row"].chunk(0).to_numpy() if files.boxes is not None else None
        """The image's row in its row group, where samples are boxes of images."""
        self._files: OpenArchives[Any] = OpenArchives(files.archives, _open, lambda file: file.close(force=True))
        # Of the thread that writes rows.
        self._files_carried: OpenArchives[Any] = OpenArchives(
            files.archives, _open, lambda file: file.close(force=True)
        )
        self._carried_group: tuple[int, Any] = (-1, None)
        """The number of the row group whose values were carried last, and all of these."""
        self._cache = RowGroupCache(
            max(slot_bytes(archive.group_bytes, max(archive.groups, default=0)) for archive in files.archives)
        )
        self._broken: dict[int, str] = {}

    def image_of(self, index: int) -> tuple[int, int]:
        """The row group, and the row in it."""
        number = int(np.searchsorted(self._stops, index, side="right"))
        if self._rows is not None:
            return number, int(self._rows[index])
        return number, index - (int(self._stops[number - 1]) if number else 0)

    def fetch(self, index: int) -> bytes:
        number, row = self.image_of(index)
        image = self._cache.get(number, row, lambda: self._read(number))
        if image is None:
            raise ValueError("null in the place of an image")
        return image

    def _read(self, number: int) -> Any:
        """Read the images of a row group."""
        import pyarrow as pa
        from pyarrow import compute

        if number in self._broken:
            raise OSError(self._broken[number])
        place, group = self._places[number]
        file = self._files[place]
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

    def carried(self, indices: npt.NDArray[np.int64]) -> dict[str, Any]:
        import pyarrow as pa

        if not self.files.carried:
            return {}
        numbers = np.searchsorted(self._stops, indices, side="right")
        stretches = np.split(np.arange(len(indices)), np.flatnonzero(np.diff(numbers)) + 1)
        tables = []
        for stretch in stretches:
            number = int(numbers[stretch[0]])
            first = int(self._stops[number - 1]) if number else 0
            rows = indices[stretch] - first if self._rows is None else self._rows[indices[stretch]]
            tables.append(self._read_carried(number).take(pa.array(rows)))
        table = pa.concat_tables(tables)
        return dict(zip(table.column_names, table.columns, strict=True))

    def _read_carried(self, number: int) -> Any:
        """Read the values that a row group's rows carry; it is kept for the rows that follow."""
        import pyarrow as pa

        if self._carried_group[0] != number:
            place, group = self._places[number]
            file, wanted = self._files_carried[place], self.files.carried
            names = find_columns(file.schema_arrow.names, wanted.names, "")
            try:
                table = file.read_row_group(group, columns=names, use_threads=False)
                columns = [table[name].cast(field.type) for name, field in zip(names, wanted, strict=True)]
            except (OSError, pa.ArrowException) as error:
                path = self.files.archives[place].path
                raise StateError(
                    f"data.carry: row group {group} of {path!r} cannot be read ({error}). Fix the file and start again."
                ) from None
            self._carried_group = number, pa.table(columns, schema=wanted)
        return self._carried_group[1]
