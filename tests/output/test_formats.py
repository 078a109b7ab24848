"""Rows ↔ the bytes of a part, in every format of tables."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mgpu_ddp.output.formats import FORMATS, TEXT_CHUNK, to_table
from mgpu_ddp.output.rows import Rows
from tests.support.samples import make_rows, texts

NAMES = ["cat", "dog", 'snow ☃, "quoted"\nand broken']
HOSTILE = [
    "new\nline.png",
    'quo"te.png',
    "com,ma.png",
    'a,"b"\r\nc.png',
    r"bytes\udcff.png",
    "snow ☃.png",
    " spaces ",
    "null",
    "NaN",
    "=1+2",
]


def written(how: str, table: pa.Table, folder: Path) -> Path:
    path = folder / f"part{FORMATS[how].suffix}"
    with path.open("wb") as file:
        FORMATS[how].write(table, file)
    return path


def text_rows(how: str, path: Path) -> list[dict[str, Any]]:
    """Read a text part with Python's own reader; an empty CSV field is null."""
    if how == "jsonl":
        return [json.loads(line, parse_constant=pytest.fail) for line in path.read_bytes().decode().splitlines()]
    with path.open(newline="", encoding="utf-8") as file:
        return [{k: v or None for k, v in row.items()} for row in csv.DictReader(file, strict=True)]


def test_columns_and_types() -> None:
    rows = make_rows(5, 3)
    table = to_table(rows, texts(["a", None, "c"]), NAMES)
    assert dict(zip(table.column_names, map(str, table.schema.types), strict=True)) == {
        "index": "int64",
        "path": "string",
        "label": "int32",
        "pred": "int32",
        "prob": "float",
        "pred_name": "string",
        "topk_index": "list<item: int32>",
        "topk_prob": "list<item: float>",
        "logits": "fixed_size_list<item: float>[3]",
        "error": "string",
    }
    assert table["index"].to_pylist() == [5, 6, 7]
    assert table["path"].to_pylist() == ["a", None, "c"]
    assert table["label"].to_pylist() == [0, 1, 2]
    assert table["pred_name"].to_pylist() == [NAMES[p] for p in rows.columns["pred"]]
    assert table["error"].to_pylist() == [None] * 3
    for name in ("topk_index", "topk_prob", "logits"):
        assert np.array_equal(np.stack(table[name].to_numpy()), rows.columns[name])
    assert to_table(rows, texts([None] * 3), None)["pred_name"].null_count == 3
    assert to_table(rows, texts([None] * 3), None).schema.equals(table.schema)


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("failed", [[6], [5, 6, 7]], ids=["one", "all"])
def test_error_rows_keep_what_is_known_and_null_the_rest(how: str, failed: list[int], tmp_path: Path) -> None:
    rows = make_rows(5, 3, errors={i: f"OSError: no {i}" for i in failed})
    rows.columns["pred"][rows.failed] = 10**6  # whatever the model said of a black image, even past the names
    table = to_table(rows, texts(["a", "b", "c"]), NAMES)
    path = written(how, table, tmp_path)
    read = pq.read_table(path).to_pylist() if how == "parquet" else text_rows(how, path)
    for index, row in zip((5, 6, 7), read, strict=True):
        assert str(row["index"]) == str(index)
        assert row["path"] == "abc"[index - 5]
        assert row["label"] is not None
        predicted = [row[k] for k in ("pred", "prob", "pred_name", "topk_index", "topk_prob", "logits")]
        if index in failed:
            assert predicted == [None] * 6
            assert row["error"] == f"OSError: no {index}"
        else:
            assert None not in predicted
            assert row["error"] is None


def test_an_unknown_label_is_null() -> None:
    rows = make_rows(0, 4)
    assert rows.label.tolist() == [-1, 0, 1, 2]
    assert to_table(rows, texts([None] * 4), None)["label"].to_pylist() == [None, 0, 1, 2]


@pytest.mark.parametrize("how", FORMATS)
def test_names_and_reasons_of_any_kind_come_back(how: str, tmp_path: Path) -> None:
    reasons = {i: f"ValueError: {name.strip()}" for i, name in enumerate(HOSTILE)}
    table = to_table(make_rows(0, len(HOSTILE), errors=reasons), texts(HOSTILE), None)
    path = written(how, table, tmp_path)
    back = FORMATS[how].columns(path, ["index", "path", "error"])
    assert back.schema.types == [pa.int64(), pa.string(), pa.string()]
    assert back["index"].to_pylist() == list(range(len(HOSTILE)))
    assert back["path"].to_pylist() == HOSTILE
    assert back["error"].to_pylist() == list(reasons.values())
    if how != "parquet":
        assert [row["path"] for row in text_rows(how, path)] == HOSTILE


@pytest.mark.parametrize("how", FORMATS)
def test_broken_lines_do_not_tear_rows_where_a_reader_splits_the_file(how: str, tmp_path: Path) -> None:
    names = [f"{i}," + "\n1,2,3" * 100 for i in range(4000)]  # more than one block of any reader
    rows = make_rows(0, 4000, wide=False)
    path = written(how, to_table(rows, texts(names), None), tmp_path)
    assert FORMATS[how].columns(path, ["index", "path"])["path"].to_pylist() == names


@pytest.mark.parametrize("how", FORMATS)
def test_absent_names_and_errors_come_back_as_null(how: str, tmp_path: Path) -> None:
    path = written(how, to_table(make_rows(0, 3), texts([None] * 3), None), tmp_path)
    back = FORMATS[how].columns(path, ["index", "path", "error"])
    assert back["path"].to_pylist() == back["error"].to_pylist() == [None] * 3


def floats() -> np.ndarray:
    """float32 values of every magnitude, subnormal ones included."""
    random = np.random.default_rng(0)
    some = random.integers(0, 2**32, 2000, dtype=np.uint32).view(np.float32)
    return np.concatenate([some[np.isfinite(some)], np.float32([0.1, 1 / 3, 1e-45, 3.4028235e38, 16777216, -0.0, 1])])


def as_rows(values: np.ndarray) -> Rows:
    n = len(values)
    columns: dict[str, Any] = {"pred": np.zeros(n, np.int32), "prob": values, "logits": values[:, None]}
    return Rows(index=np.arange(n), label=np.full(n, -1, np.int32), columns=columns, errors={})


@pytest.mark.parametrize("how", ["csv", "jsonl"])
def test_text_numbers_are_short_and_read_back_bitwise_equal(how: str, tmp_path: Path) -> None:
    values = floats()
    path = written(how, to_table(as_rows(values), texts([None] * len(values)), None), tmp_path)
    rows = text_rows(how, path)
    lists = [json.loads(r["logits"]) if how == "csv" else r["logits"] for r in rows]
    for read in ([r["prob"] for r in rows], [item for (item,) in lists]):
        assert np.array_equal(np.array(read, dtype=np.float32).view(np.uint32), values.view(np.uint32))
    raw = path.read_text()
    assert "0.33333334" in raw
    assert "0.333333343" not in raw, "more digits than float32 has"
    assert "0.1000000" not in raw


@pytest.mark.parametrize("how", ["csv", "jsonl"])
def test_nan_and_infinity_become_null_in_text(how: str, tmp_path: Path) -> None:
    values = np.float32([np.nan, np.inf, -np.inf, 0.5])
    path = written(how, to_table(as_rows(values), texts([None] * 4), None), tmp_path)
    rows = text_rows(how, path)
    lists = [json.loads(r["logits"], parse_constant=pytest.fail) if how == "csv" else r["logits"] for r in rows]
    assert lists == [[None], [None], [None], [0.5]]
    assert [r["prob"] and float(r["prob"]) for r in rows] == [None, None, None, 0.5]


def test_parquet_keeps_nan(tmp_path: Path) -> None:
    path = written("parquet", to_table(as_rows(np.float32([np.nan, 0.5])), texts([None] * 2), None), tmp_path)
    assert np.isnan(pq.read_table(path)["prob"].to_pylist()[0])


def test_csv_lists_are_json_text(tmp_path: Path) -> None:
    rows = make_rows(0, 2)
    path = written("csv", to_table(rows, texts([None] * 2), None), tmp_path)
    for row, expected in zip(text_rows("csv", path), rows.columns["topk_index"].tolist(), strict=True):
        assert json.loads(row["topk_index"]) == expected


@pytest.mark.parametrize("how", ["csv", "jsonl"])
def test_parts_longer_than_a_chunk_have_one_header_and_every_row(how: str, tmp_path: Path) -> None:
    count = TEXT_CHUNK + 3
    index = np.arange(count)
    columns: dict[str, Any] = {"pred": index.astype(np.int32), "prob": np.ones(count, np.float32)}
    rows = Rows(index=index, label=np.full(count, -1, np.int32), columns=columns, errors={})
    path = written(how, to_table(rows, texts(["x"] * count), None), tmp_path)
    assert [int(row["pred"]) for row in text_rows(how, path)] == list(range(count))
    assert FORMATS[how].columns(path, ["index"])["index"].to_pylist() == list(range(count))


@pytest.mark.parametrize("how", FORMATS)
def test_very_wide_rows_can_be_read_back(how: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((3, 100_000)).astype(np.float32)
    columns: dict[str, Any] = {"pred": np.zeros(3, np.int32), "prob": np.ones(3, np.float32), "logits": values}
    rows = Rows(index=np.arange(3), label=np.full(3, -1, np.int32), columns=columns, errors={})
    path = written(how, to_table(rows, texts([None] * 3), None), tmp_path)
    assert FORMATS[how].columns(path, ["index"])["index"].to_pylist() == [0, 1, 2]


def test_jsonl_is_one_utf8_object_a_line(tmp_path: Path) -> None:
    table = to_table(make_rows(0, 2), texts(["a\nb ☃", "c"]), None)
    buffer = io.BytesIO()
    FORMATS["jsonl"].write(table, buffer)
    lines = buffer.getvalue().split(b"\n")
    assert len(lines) == 3
    assert lines[2] == b""
    assert "☃".encode() in lines[0]
    assert list(json.loads(lines[0])) == table.column_names
