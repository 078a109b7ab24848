"""Boxes in images: read from columns of a list or a Parquet file, and as the pixels that are cut out.

A box is (x0, y0, x1, y1) in pixels of the upright image; x1 and y1 are the first that are outside of it.
"""

import json
import math
from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from mgpu_ddp.config.checks import require
from mgpu_ddp.data.labels import is_text
from mgpu_ddp.errors import UsageError
from mgpu_ddp.preprocess.transform import Integers, Window

FIELDS = ("x0", "y0", "x1", "y1")
WITHOUT = "without boxes"
"""The kind of images that have no row, among those left out."""
RULE = "boxes of four numbers, [x0,y0,x1,y1] or a list of these"
SHOWN = 80
"""Characters of a wrong value."""

Boxes = tuple[Integers, npt.NDArray[np.float64]]
"""The number of boxes of each image, (images,), and the boxes of all, (boxes, 4)."""
Where = Callable[[int], str]
"""Names the place of a row, by its number."""


def read_boxes(columns: Sequence[Any], where: Where) -> Boxes:
    """Read the boxes of images from one column, of JSON, lists or structs, or from four of numbers.

    Null, an empty text and an empty list are no box.

    Raises:
        UsageError: something else stands there; names the place.
    """
    import pyarrow as pa

    read = _of_numbers if len(columns) > 1 else _of_texts if is_text(columns[0].type) else _of_lists
    counts, boxes = [np.empty(0, np.int64)], [np.empty((0, 4))]
    first = 0
    # By chunks, which bounds memory.
    for batch in pa.table([*columns], names=[*FIELDS[: len(columns)]]).to_batches():
        try:
            found = read(*batch.columns)
        except _WrongBoxError as wrong:
            text = repr(wrong.value)
            shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
            place = where(first + wrong.row)
            raise UsageError(f"data.box_column must hold {RULE}, got {shown} in {place}. Correct it.") from None
        counts.append(found[0])
        boxes.append(found[1])
        first += len(batch)
    return np.concatenate(counts), np.concatenate(boxes)


def as_lists(counts: Integers, boxes: npt.NDArray[np.float64], mask: Any = None) -> Any:
    """An Arrow array of lists of boxes, of which each is a list of four; null where `mask` is true."""
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(counts)])
    entries = pa.FixedSizeListArray.from_arrays(pa.array(boxes.reshape(-1)), 4)
    return pa.LargeListArray.from_arrays(pa.array(offsets), entries, mask=None if mask is None else pa.array(mask))


def require_boxes(count: int) -> None:
    """Require that there are any."""
    require(count > 0, "data.box_column", "a column with boxes", "none in any row", "Name another.")


def window_of(box: Sequence[float], width: int, height: int) -> tuple[Window, bool]:
    """The pixels of a box in an image, and whether it reached beyond.

    Rounded as Pillow's `Image.crop` does, halves to the even number, then clipped.

    Raises:
        ValueError: no pixel is left.
    """
    limits = (width, height, width, height)
    if not any(map(math.isnan, box)):
        rounded = [value if math.isinf(value) else round(value) for value in box]
        x0, y0, x1, y1 = (int(min(max(value, 0), limit)) for value, limit in zip(rounded, limits, strict=True))
        if x0 < x1 and y0 < y1:
            return (x0, y0, x1, y1), [x0, y0, x1, y1] != rounded
    shown = ", ".join(f"{value:g}" for value in box)
    raise ValueError(f"the box [{shown}] has no pixel of the image, which is {width}x{height}")


class _WrongBoxError(Exception):
    """A row of a chunk holds something else than boxes."""

    def __init__(self, row: int, value: Any) -> None:
        super().__init__()
        self.row, self.value = row, value


def _require_kind(ok: bool, kind: Any) -> None:
    require(ok, "data.box_column", "a column of JSON, lists or structs, or four of numbers", str(kind), "Name another.")


def _of_texts(column: Any) -> Boxes:
    counts, numbers = array("q"), array("d")
    for row, cell in enumerate(column.to_pylist()):
        try:
            mine = _parsed(cell) if cell and not cell.isspace() else []
            numbers.extend(mine)
        except (ValueError, OverflowError, RecursionError):
            raise _WrongBoxError(row, cell) from None
        counts.append(len(mine) // 4)
    return np.array(counts, np.int64), np.array(numbers, np.float64).reshape(-1, 4)


def _parsed(cell: str) -> list[float]:
    """The numbers of the boxes of a JSON text, four each.

    Raises:
        ValueError: it is something else.
    """
    found = json.loads(cell)
    boxes = [found] if type(found) is list and found and type(found[0]) is not list else found
    # Set by set, because there may be tens of millions of numbers.
    if type(boxes) is not list or {*map(type, boxes)} - {list} or {*map(len, boxes)} - {4}:
        raise ValueError
    numbers = [*chain.from_iterable(boxes)]
    if {*map(type, numbers)} - {int, float}:
        raise ValueError
    return numbers


def _of_numbers(*columns: Any) -> Boxes:
    """Four columns, of numbers or texts of these: one box a row, or none where all are null."""
    numbers = [_as_floats(column) for column in columns]
    num_given = np.sum([np.asarray(each.is_valid()) for each in numbers], axis=0)
    if (partly := np.flatnonzero((num_given > 0) & (num_given < len(numbers)))).size:
        row = int(partly[0])
        raise _WrongBoxError(row, [each[row].as_py() for each in numbers])
    boxes = np.stack([each.to_numpy(zero_copy_only=False) for each in numbers], axis=1)
    return np.minimum(num_given, 1), boxes[num_given > 0]


def _as_floats(column: Any) -> Any:
    import pyarrow as pa
    from pyarrow import compute

    if is_text(column.type):
        column = compute.utf8_trim_whitespace(column.cast(pa.large_string()))
        column = compute.if_else(compute.equal(column, ""), pa.scalar(None, pa.large_string()), column)
    else:
        _require_kind(_is_number(column.type) or pa.types.is_null(column.type), column.type)
    try:
        return column.cast(pa.float64(), safe=False)
    except pa.ArrowInvalid:
        # The error does not tell which.
        for row in range(len(column)):
            try:
                column.slice(row, 1).cast(pa.float64(), safe=False)
            except pa.ArrowInvalid:
                raise _WrongBoxError(row, column[row].as_py()) from None
        raise


def _of_lists(column: Any) -> Boxes:
    """Lists of structs or of lists, or one of these a row."""
    import pyarrow as pa
    from pyarrow import compute

    kind = column.type
    if pa.types.is_null(kind):
        return np.zeros(len(column), np.int64), np.empty((0, 4))
    lengths = compute.list_value_length(column).fill_null(0) if _is_list(kind) else column.is_valid().cast(pa.int32())
    if _is_list(kind) and (_is_list(kind.value_type) or pa.types.is_struct(kind.value_type)):
        counts, entries = np.asarray(lengths).astype(np.int64), column.flatten()
    else:
        counts = (np.asarray(lengths) > 0).astype(np.int64)
        entries = column.filter(pa.array(counts > 0))
    boxes, is_box = _entries(entries, kind)
    if not is_box.all():
        row = int(np.repeat(np.arange(len(counts)), counts)[~is_box][0])
        raise _WrongBoxError(row, column[row].as_py())
    return counts, boxes


def _entries(entries: Any, kind: Any) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Structs or lists as boxes (n, 4), and which of them are."""
    import pyarrow as pa
    from pyarrow import compute

    inner = entries.type
    if pa.types.is_struct(inner) and all(
        inner.get_field_index(name) >= 0 and _is_number(inner.field(name).type) for name in FIELDS
    ):
        columns = [compute.struct_field(entries, name).cast(pa.float64(), safe=False) for name in FIELDS]
        num_given = np.sum([np.asarray(column.is_valid()) for column in columns], axis=0)
        values = np.stack([column.to_numpy(zero_copy_only=False) for column in columns], axis=1)
        return values, num_given == len(FIELDS)
    _require_kind(_is_list(inner) and _is_number(inner.value_type), kind)
    lengths = np.asarray(compute.fill_null(compute.list_value_length(entries), 0))
    numbers = entries.flatten().cast(pa.float64(), safe=False)
    owners, is_box = np.repeat(np.arange(len(entries)), lengths), lengths == 4
    is_box[owners[~np.asarray(numbers.is_valid())]] = False
    values = numbers.to_numpy(zero_copy_only=False)
    return (values.reshape(-1, 4) if is_box.all() else np.empty((0, 4))), is_box


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_number(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))
