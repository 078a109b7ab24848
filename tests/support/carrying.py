"""Columns of all kinds that `data.carry` copies, in a list and in Parquet files."""

import csv
import datetime as dt
import decimal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mgpu_ddp.config.schema import ListConfig, ParquetConfig

KINDS: dict[str, Any] = {
    "id": pa.int64(),
    "url": pa.string(),
    "score": pa.float32(),
    "seen": pa.bool_(),
    "day": pa.date32(),
    "at": pa.timestamp("us", "UTC"),
    "price": pa.decimal128(9, 2),
    "tags": pa.list_(pa.string()),
    "boxes": pa.list_(pa.struct([("x", pa.float64()), ("made", pa.date32()), ("of", pa.list_(pa.int32()))])),
    "nothing": pa.null(),
    "kind": pa.dictionary(pa.int32(), pa.string()),
    "label": pa.string(),
}
"""Arrow's types of the columns; the last is called as one of ours."""
TEXTS = ("plain", 'a, "b"\nc', "☃ <b>&amp;", "", "007")


def values_of(number: int) -> dict[str, Any]:
    """What row `number` carries; a part of it is null in every fifth row."""
    values = {
        "id": 2**53 + number,
        "url": f"https://example.org/{number}?{TEXTS[number % len(TEXTS)]}",
        "score": number / 8,
        "seen": number % 2 == 0,
        "day": dt.date(2020, 1, 1) + dt.timedelta(number),
        "at": dt.datetime(2020, 1, 1, 12, 30, 1, number, tzinfo=dt.UTC),
        "price": decimal.Decimal(number) / 4,
        "tags": list(TEXTS[: number % 4]),
        "boxes": [
            {"x": number / 3, "made": dt.date(1999, 1, 1), "of": [number]},
            {"x": None, "made": None, "of": None},
        ],
        "nothing": None,
        "kind": TEXTS[number % 2],
        "label": f"class{number % 3}",
    }
    return {name: None if number % 5 == 4 and name != "id" else value for name, value in values.items()}


def column_of(name: str, numbers: Sequence[int]) -> pa.Array:
    return pa.array([values_of(number)[name] for number in numbers], KINDS[name])


def carried_by(table: pa.Table, names: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """The values of rows in the columns that carry, by the names of their sources."""
    names = names or {name: f"source_{name}" if name == "label" else name for name in KINDS}
    return [{name: row[column] for name, column in names.items()} for row in table.to_pylist()]


def parquet_source(root: Path, images: Sequence[Path]) -> ParquetConfig:
    """Two files, in row groups of 4 rows."""
    half = -(-len(images) // 2)
    for file in range(2):
        mine = range(file * half, min((file + 1) * half, len(images)))
        columns = {name: column_of(name, mine) for name in KINDS}
        table = pa.table({"image": [images[number].read_bytes() for number in mine], **columns})
        pq.write_table(table, root / f"carry-{file}.parquet", row_group_size=4)
    return ParquetConfig(urls=f"{root}/carry-*.parquet", carry=list(KINDS))


def parquet_list(path: Path, images: Sequence[Path]) -> ListConfig:
    columns = {name: column_of(name, range(len(images))) for name in KINDS if name != "label"}
    table = pa.table({"path": [str(image) for image in images], **columns})
    pq.write_table(table.append_column("label", column_of("label", range(len(images)))), path)
    return ListConfig(path=str(path), carry=list(KINDS))


def csv_list(path: Path, images: Sequence[Path], columns: Mapping[str, Sequence[Any]]) -> ListConfig:
    """A CSV of images with further columns, None an empty cell."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", *columns])
        writer.writerows(zip(map(str, images), *columns.values(), strict=True))
    return ListConfig(path=str(path), carry=list(columns))
