"""Rows ↔ the bytes of a part, in each format of tables.

A table has the columns `index` int64, `path` string, `label` int32, what samples carry (`box`, a list of four float64,
among it, and columns of any Arrow type), then the model's, then `error` string. A classifier's are `pred` int32, `prob`
float32, `pred_name` string, `topk_index` and `topk_prob` as lists, and `logits`, `probs`, `embedding` as fixed-size
lists where asked for. Of other models a scalar is a column of its dtype, a tensor a fixed-size list (its shape, of more
than one dimension, stands in the field's metadata), and what differs in length from row to row a list. The model's
columns are null in an error row. CSV holds lists and structs as JSON text; JSONL holds one object a line. Dates, times
and decimals are text in both.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mgpu_ddp.data.labels import is_text
from mgpu_ddp.output.columns import BOX, Column, ColumnType, Ragged, Values
from mgpu_ddp.output.rows import Rows

TEXT_CHUNK = 4096
"""Rows that are turned into text at once, to bound memory."""
BLOCK_BYTES = 64 << 20
"""No row of text is longer."""
VARIABLE = ("topk_index", "topk_prob")
"""Columns of one length that are lists of any length in the table, which readers of it rely on."""
REPEATING = ["label", "pred", "pred_name", "topk_index.list.element", "error"]
"""Columns worth a dictionary in Parquet: one of names or probabilities takes time and makes the file larger."""


def to_table(
    rows: Rows, names: Any, class_names: Sequence[str] | None, carried_as_is: Mapping[str, Any] | None = None
) -> Any:
    """An Arrow table of the rows; `names` are theirs, an Arrow array of strings.

    `carried_as_is` are Arrow arrays that their source has, and the rows have not.
    """
    import pyarrow as pa

    failed = rows.failed if rows.errors else None
    carried = {name: _carried(column) for name, column in rows.carried.items()}
    columns = {
        "index": pa.array(rows.index),
        "path": carried.pop("path", names),
        "label": pa.array(rows.label, mask=rows.label < 0),
        **carried,
        **(carried_as_is or {}),
    }
    for name, column in rows.columns.items():
        columns[name] = _array(name, column, failed)
        if name == "prob":
            columns["pred_name"] = _class_names(rows.columns["pred"], class_names, failed)
    columns["error"] = pa.nulls(len(rows), pa.string())
    if rows.errors:
        columns["error"] = pa.array([rows.errors.get(i) for i in rows.index.tolist()], type=pa.string())
    fields = [
        pa.field(name, column.type, metadata=_shape_of(rows.columns.get(name))) for name, column in columns.items()
    ]
    return pa.table(columns, schema=pa.schema(fields))


def empty_table(types: Sequence[ColumnType]) -> Any:
    """An Arrow table of no rows, with the columns that a manifest lists: carried ones, then the model's."""
    import pyarrow as pa

    as_is = {each.name: pa.array([], each.arrow_type) for each in types if each.arrow}
    types = [each for each in types if not each.arrow]
    # A model's first scalars are among them, which makes no difference to their types.
    carried = [*takewhile(lambda each: each.name != "pred" and (each == BOX or not (each.shape or each.ragged)), types)]
    rows = Rows(
        index=np.empty(0, np.int64),
        label=np.empty(0, np.int32),
        columns={each.name: each.empty() for each in types[len(carried) :]},
        errors={},
        carried={each.name: np.ma.MaskedArray(each.empty()) for each in carried},
    )
    return to_table(rows, pa.nulls(0, pa.string()), None, as_is)


def is_readable(kind: Any, how: str) -> bool:
    """True for an Arrow type that the format can hold and give back."""
    import pyarrow as pa

    if how == "parquet":
        return True
    if _is_list(kind):
        return is_readable(kind.value_type, how)
    if pa.types.is_struct(kind):
        inner = [kind.field(number) for number in range(kind.num_fields)]
        is_unique = len({field.name for field in inner}) == len(inner)
        return is_unique and all(is_readable(field.type, how) for field in inner)
    checks = (pa.types.is_null, pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating)
    return is_text(kind) or _is_written_out(kind) or any(check(kind) for check in checks)


def _carried(column: Any) -> Any:
    import pyarrow as pa

    if column.ndim > 1:
        return _array("", column.data, np.ma.getmaskarray(column)[:, 0])
    kind = pa.string() if column.dtype == object else None
    return pa.array(column.data, type=kind, mask=np.ma.getmaskarray(column))


def _class_names(pred: Any, class_names: Sequence[str] | None, failed: npt.NDArray[np.bool_] | None) -> Any:
    import pyarrow as pa

    if not class_names:
        return pa.nulls(len(pred), pa.string())
    picked = np.where(failed, 0, pred) if failed is not None else pred
    return pa.array(list(class_names), type=pa.string()).take(pa.array(picked, mask=failed))


def _array(name: str, column: Column, failed: npt.NDArray[np.bool_] | None) -> Any:
    """A column as an Arrow array, null where a row failed."""
    import pyarrow as pa

    mask = pa.array(failed) if failed is not None else None
    if isinstance(column, Ragged):
        return pa.ListArray.from_arrays(pa.array(column.offsets.astype(np.int32)), _entries(column.values), mask=mask)
    if name in VARIABLE:
        offsets = pa.array(np.arange(len(column) + 1, dtype=np.int32) * column.shape[1])
        return pa.ListArray.from_arrays(offsets, pa.array(column.reshape(-1)), mask=mask)
    if column.ndim == 1:
        return pa.array(column, mask=failed)
    return pa.FixedSizeListArray.from_arrays(_flat(column), int(np.prod(column.shape[1:])), mask=mask)


def _entries(values: Values) -> Any:
    import pyarrow as pa

    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(_flat(values), int(np.prod(values.shape[1:])))


def _flat(values: Values) -> Any:
    import pyarrow as pa

    return pa.array(np.ascontiguousarray(values).reshape(-1))


def _shape_of(column: Column | None) -> dict[str, str] | None:
    """The metadata of a column whose rows or entries have more than one dimension, which Arrow's lists flatten."""
    values = column.values if isinstance(column, Ragged) else column
    return {"shape": json.dumps(values.shape[1:])} if values is not None and values.ndim > 2 else None


class Parquet:
    suffix = ".parquet"

    def write(self, table: Any, file: BinaryIO) -> None:
        import pyarrow.parquet as pq

        pq.write_table(table, file, compression="zstd", use_dictionary=REPEATING, write_page_checksum=True)

    def read(self, path: Path, schema: Any) -> Any:
        import pyarrow.parquet as pq

        return pq.read_table(path, schema=schema, partitioning=None)

    def columns(self, path: Path, names: list[str]) -> Any:
        import pyarrow.parquet as pq

        return pq.read_table(path, columns=names, partitioning=None)


class Csv:
    suffix = ".csv"

    def write(self, table: Any, file: BinaryIO) -> None:
        import pyarrow as pa
        from pyarrow import csv

        header = True
        for chunk in _chunks(table):
            columns = {name: _csv_column(chunk[name]) for name in chunk.column_names}
            csv.write_csv(pa.table(columns), file, csv.WriteOptions(include_header=header))
            header = False

    def read(self, path: Path, schema: Any) -> Any:
        import pyarrow as pa

        types = {field.name: pa.string() if _is_nested(field.type) else _loose(field.type) for field in schema}
        table = self._read(path, types)
        columns = [
            _parsed(table[field.name], field.type) if _is_nested(field.type) else table[field.name].cast(field.type)
            for field in schema
        ]
        return pa.table(columns, schema=schema)

    def columns(self, path: Path, names: list[str]) -> Any:
        return self.read(path, _narrow(names))

    def _read(self, path: Path, types: dict[str, Any]) -> Any:
        from pyarrow import csv

        convert = csv.ConvertOptions(
            include_columns=list(types),
            column_types=types,
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        )
        parse, read = csv.ParseOptions(newlines_in_values=True), csv.ReadOptions(block_size=BLOCK_BYTES)
        return csv.read_csv(path, read, parse, convert)


class JsonLines:
    suffix = ".jsonl"

    def write(self, table: Any, file: BinaryIO) -> None:
        for chunk in _chunks(table):
            columns = [_values(chunk[name]) for name in chunk.column_names]
            for row in zip(*columns, strict=True):
                record = dict(zip(chunk.column_names, row, strict=True))
                file.write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")

    def read(self, path: Path, schema: Any) -> Any:
        import pyarrow as pa

        loose = [(field.name, _loose(field.type)) for field in schema]
        return self._read(path, pa.schema(loose)).cast(schema)

    def columns(self, path: Path, names: list[str]) -> Any:
        return self._read(path, _narrow(names))

    def _read(self, path: Path, schema: Any) -> Any:
        from pyarrow import json as arrow_json

        options = arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
        block = arrow_json.ReadOptions(block_size=BLOCK_BYTES)
        return arrow_json.read_json(path, read_options=block, parse_options=options)


def _narrow(names: list[str]) -> Any:
    """The schema of columns whose type is always the same."""
    import pyarrow as pa

    types = {
        "index": pa.int64(),
        "path": pa.string(),
        "error": pa.string(),
        "label": pa.int32(),
        "pred": pa.int32(),
        "prob": pa.float32(),
        "topk_index": pa.list_(pa.int32()),
    }
    return pa.schema([(name, types[name]) for name in names])


def _loose(kind: Any) -> Any:
    """The type as which Arrow reads text: it knows no lists of one length, no half precision and few dates."""
    import pyarrow as pa

    if _is_list(kind):
        return pa.list_(_loose(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _loose(field.type)) for field in map(kind.field, range(kind.num_fields))])
    if _is_written_out(kind):
        return pa.string()
    return pa.float32() if pa.types.is_float16(kind) else kind


def _parsed(texts: Any, kind: Any) -> Any:
    """Lists and structs that are written as JSON."""
    import pyarrow as pa
    from pyarrow import compute

    is_plain = _is_list(kind) and pa.types.is_primitive(kind.value_type) and not _is_written_out(kind.value_type)
    if not is_plain or compute.any(compute.equal(texts, "[]")).as_py():
        values = [None if text is None else json.loads(text) for text in texts.to_pylist()]
        return pa.array(values, type=_loose(kind)).cast(kind)
    lists = compute.split_pattern(compute.utf8_slice_codeunits(texts.combine_chunks(), 1, -1), ", ")
    numbers = compute.if_else(compute.equal(lists.values, "null"), None, lists.values).cast(kind.value_type)
    return pa.ListArray.from_arrays(lists.offsets, numbers, mask=texts.combine_chunks().is_null()).cast(kind)


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind))


def _is_nested(kind: Any) -> bool:
    import pyarrow as pa

    return _is_list(kind) or bool(pa.types.is_struct(kind))


def _is_written_out(kind: Any) -> bool:
    """True for a type whose values are text in texts."""
    import pyarrow as pa

    checks = (pa.types.is_date, pa.types.is_time, pa.types.is_timestamp, pa.types.is_decimal)
    return any(check(kind) for check in checks)


def _csv_column(column: Any) -> Any:
    import pyarrow as pa

    if _is_nested(column.type):
        texts = [None if v is None else json.dumps(v, ensure_ascii=False) for v in _values(column)]
        return pa.array(texts, type=pa.string())
    if _is_written_out(column.type):
        return column.cast(pa.string())
    # As float64, the shortest text of a float32 stays as short.
    return pa.array(_values(column), type=pa.float64()) if pa.types.is_floating(column.type) else column


Format = Parquet | Csv | JsonLines
FORMATS: dict[str, Format] = {"parquet": Parquet(), "csv": Csv(), "jsonl": JsonLines()}


def _chunks(table: Any) -> Iterator[Any]:
    for start in range(0, max(table.num_rows, 1), TEXT_CHUNK):
        yield table.slice(start, TEXT_CHUNK).combine_chunks()


def _values(column: Any) -> list[Any]:
    """Python values whose text is the shortest that reads back as the same number; NaN and Inf become None."""
    import pyarrow as pa

    kind = column.type
    while _is_list(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind) or _is_written_out(kind):
        column = column.cast(_loose(column.type))
    values: list[Any] = column.to_pylist()
    if not (pa.types.is_floating(kind) or pa.types.is_struct(kind)):
        return values
    return _each(values, _short if kind == pa.float32() else _finite)


def _each(values: Iterable[Any], text_of: Callable[[float], float | None]) -> list[Any]:
    """Apply a function to all floats in nested lists and structs."""
    return [
        _each(value, text_of)
        if isinstance(value, list)
        else dict(zip(value, _each(value.values(), text_of), strict=True))
        if isinstance(value, dict)
        else text_of(value)
        if isinstance(value, float)
        else value
        for value in values
    ]


def _short(value: float) -> float | None:
    return float(str(np.float32(value))) if np.isfinite(value) else None


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
