"""Rows ↔ the bytes of a part, in each format of tables.

A table has the columns `index` int64, `path` string, `label` int32, `pred` int32, `prob` float32, `pred_name`
string, then `topk_index` and `topk_prob` as lists, then `logits`, `probs`, `embedding` as fixed-size lists
where asked for, then `error` string. Prediction columns of an error row are null. CSV holds lists as JSON
text; JSONL holds one object a line.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mgpu_ddp.output.rows import Column, Rows

TEXT_CHUNK = 4096
"""Rows that are turned into text at once, to bound memory."""
REPEATING = ["label", "pred", "pred_name", "topk_index.list.element", "error"]
"""Columns worth a dictionary in Parquet: one of names or probabilities takes time and makes the file larger."""


def to_table(rows: Rows, names: Any, class_names: Sequence[str] | None) -> Any:
    """An Arrow table of the rows; `names` are theirs, an Arrow array of strings."""
    import pyarrow as pa

    failed = rows.failed if rows.errors else None
    pred = rows.columns["pred"]
    classes = pa.array(list(class_names) if class_names else [None], type=pa.string())
    picked = np.where(failed, 0, pred) if failed is not None else pred
    columns = {
        "index": pa.array(rows.index),
        "path": names,
        "label": pa.array(rows.label, mask=rows.label < 0),
        "pred": pa.array(pred, mask=failed),
        "prob": pa.array(rows.columns["prob"], mask=failed),
        "pred_name": classes.take(pa.array(picked, mask=failed)) if class_names else pa.nulls(len(rows), pa.string()),
    }
    for name in ("topk_index", "topk_prob"):
        if name in rows.columns:
            columns[name] = _lists(rows.columns[name], failed)
    for name in ("logits", "probs", "embedding"):
        if name in rows.columns:
            values = rows.columns[name]
            mask = pa.array(failed) if failed is not None else None
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1], mask=mask)
    columns["error"] = pa.nulls(len(rows), pa.string())
    if rows.errors:
        columns["error"] = pa.array([rows.errors.get(i) for i in rows.index.tolist()], type=pa.string())
    return pa.table(columns)


def _lists(values: Column, failed: npt.NDArray[np.bool_] | None) -> Any:
    import pyarrow as pa

    offsets = pa.array(np.arange(len(values) + 1, dtype=np.int32) * values.shape[1])
    mask = pa.array(failed) if failed is not None else None
    return pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1)), mask=mask)


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

        types = {field.name: pa.string() if _is_list(field.type) else field.type for field in schema}
        table = self._read(path, types)
        columns = [
            _parsed(table[field.name], field.type) if _is_list(field.type) else table[field.name] for field in schema
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
        return csv.read_csv(path, parse_options=csv.ParseOptions(newlines_in_values=True), convert_options=convert)


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

        # Arrow's reader of JSON knows lists of any length only.
        loose = [(f.name, pa.list_(f.type.value_type) if _is_list(f.type) else f.type) for f in schema]
        return self._read(path, pa.schema(loose)).cast(schema)

    def columns(self, path: Path, names: list[str]) -> Any:
        return self._read(path, _narrow(names))

    def _read(self, path: Path, schema: Any) -> Any:
        from pyarrow import json as arrow_json

        options = arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
        block = arrow_json.ReadOptions(block_size=64 << 20)
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


def _parsed(texts: Any, kind: Any) -> Any:
    """Lists of numbers that are written as JSON."""
    import pyarrow as pa
    from pyarrow import compute

    lists = compute.split_pattern(compute.utf8_slice_codeunits(texts.combine_chunks(), 1, -1), ", ")
    numbers = compute.if_else(compute.equal(lists.values, "null"), None, lists.values).cast(kind.value_type)
    return pa.ListArray.from_arrays(lists.offsets, numbers, mask=texts.combine_chunks().is_null()).cast(kind)


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind))


def _csv_column(column: Any) -> Any:
    import pyarrow as pa

    if _is_list(column.type):
        return pa.array([None if v is None else json.dumps(v) for v in _values(column)], type=pa.string())
    # As float64, the shortest text of a float32 stays as short.
    return pa.array(_values(column), type=pa.float64()) if column.type == pa.float32() else column


Format = Parquet | Csv | JsonLines
FORMATS: dict[str, Format] = {"parquet": Parquet(), "csv": Csv(), "jsonl": JsonLines()}


def _chunks(table: Any) -> Iterator[Any]:
    for start in range(0, max(table.num_rows, 1), TEXT_CHUNK):
        yield table.slice(start, TEXT_CHUNK).combine_chunks()


def _values(column: Any) -> list[Any]:
    """Python values whose text is the shortest that reads back as the same float32; NaN and Inf become None."""
    import pyarrow as pa

    flat = column.type.value_type if hasattr(column.type, "value_type") else column.type
    if flat != pa.float32():
        return list(column.to_pylist())
    if flat is column.type or flat == column.type:
        return [None if v is None else _short(v) for v in column.to_pylist()]
    return [None if row is None else [_short(v) for v in row] for row in column.to_pylist()]


def _short(value: float) -> float | None:
    return float(str(np.float32(value))) if np.isfinite(value) else None
