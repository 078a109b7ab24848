"""`mgpu_ddp.open`: the same table from every format, what is committed of a running job, and folders that are none."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import mgpu_ddp
from mgpu_ddp.data.listing import FILE_NAME, Listing
from mgpu_ddp.errors import StateError, UsageError
from mgpu_ddp.output.columns import Column, ColumnType, Ragged, as_json
from mgpu_ddp.output.formats import FORMATS
from mgpu_ddp.output.manifest import PARTS, Manifest
from mgpu_ddp.output.rows import Rows
from mgpu_ddp.output.run_folder import RunFolder
from mgpu_ddp.run import Run
from tests.support.run_folders import CLASSES, FAILED, HOWS, SAMPLES, claim, wanted, write_parts, writer_of
from tests.support.samples import make_rows

DETECTOR: dict[str, Column] = {
    "boxes": Ragged(values=np.arange(28, dtype=np.float32).reshape(7, 4), lengths=np.array([3, 0, 4])),
    "labels": Ragged(values=np.arange(7, dtype=np.int64), lengths=np.array([3, 0, 4])),
    "scores": Ragged(values=np.arange(7, dtype=np.float16) / 8, lengths=np.array([3, 0, 4])),
    "masks": Ragged(values=np.arange(28, dtype=np.uint8).reshape(7, 2, 2), lengths=np.array([3, 0, 4])),
}
HEADS: dict[str, Column] = {
    "blurred": np.array([True, False, True]),
    "score": np.array([0.5, 0.25, 1.0], np.float16),
    "grid": np.arange(12, dtype=np.float32).reshape(3, 2, 2),
    "code": np.arange(6, dtype=np.int8).reshape(3, 2),
    "halves": np.arange(6, dtype=np.float16).reshape(3, 2) / 2,
}
KINDS: dict[str, tuple[dict[str, Column], dict[str, Any]]] = {
    "classes": (make_rows(0, 3).columns, {}),
    "detector": (DETECTOR, {}),
    "heads": (HEADS, {}),
    "carried": (HEADS, {"text": np.ma.MaskedArray(["a,\n☃", "", ""], [0, 1, 0], dtype=object), "id": np.arange(3)}),
}


def manifest_of(how: str, columns: dict[str, Any], **changes: Any) -> Manifest:
    types = as_json([ColumnType.of(name, column) for name, column in columns.items()])
    fingerprint = {"model.num_classes": CLASSES if "pred" in columns else None}
    return wanted(how, fingerprint=fingerprint, columns=types, **changes)


def classes_in(run_dir: Path, how: str, *stops: int) -> RunFolder:
    """A folder of a classifier, 20 samples, with parts up to these stops."""
    rows = make_rows(0, 1)
    folder = claim(run_dir, how, manifest=manifest_of(how, rows.columns))
    folder.mark_running()
    write_parts(folder, *stops)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", FORMATS)
def test_every_format_gives_the_table_that_was_written(tmp_path: Path, how: str, kind: str) -> None:
    columns, carried = KINDS[kind]
    typed = {name: column.data if isinstance(column, np.ma.MaskedArray) else column for name, column in carried.items()}
    folder = claim(tmp_path, how, manifest=manifest_of(how, typed | columns, stop=6))
    writer, expected = writer_of(folder), []
    for first in (0, 3):
        rows = Rows(
            index=np.arange(first, first + 3),
            label=np.array([0, -1, 2], np.int32),
            columns=columns,
            errors={first + 1: "ValueError: a, b"},
            carried={name: np.ma.MaskedArray(column) for name, column in carried.items()},
        )
        folder.open_table(writer).add(rows)
        expected.append(writer._table(rows))  # type: ignore[attr-defined]
    table = mgpu_ddp.open(tmp_path).table()
    assert table.equals(pa.concat_tables(expected))
    assert table.schema.equals(expected[0].schema)
    shapes = {field.name: field.metadata[b"shape"] for field in table.schema if b"shape" in (field.metadata or {})}
    assert shapes == {name: b"[2, 2]" for name in ("grid", "masks") if name in columns}


@pytest.mark.parametrize("how", HOWS)
def test_a_running_job_has_what_is_committed(tmp_path: Path, how: str) -> None:
    folder = classes_in(tmp_path, how)
    run = mgpu_ddp.open(str(tmp_path))
    assert run.folder == tmp_path
    assert (run.table().num_rows, run.errors()) == (0, [])
    before = run.table().schema
    write_parts(folder, 12, 18)
    table = run.table()
    assert table.schema.equals(before)
    assert table["index"].to_pylist() == [*range(18)]
    assert [error["index"] for error in run.errors()] == [*FAILED]
    assert [row["index"] for row in table.to_pylist() if row["logits"] is None] == [*FAILED]
    assert run.summary["status"] == "running"
    assert [run.summary[name] for name in ("samples", "rows", "ok", "errors", "missing")] == [20, 18, 16, 2, 2]
    assert run.summary["predictions"] == [18, CLASSES]
    assert repr(run) == f"<Run '{tmp_path}': running, 18 of 20 rows, 2 errors>"


@pytest.mark.parametrize("how", HOWS)
def test_errors_are_those_of_the_file(tmp_path: Path, how: str) -> None:
    folder = classes_in(tmp_path, how, 20)
    paths = [str(SAMPLES.path(index)).encode() for index in range(20)]
    (tmp_path / FILE_NAME).write_bytes(Listing.build(paths).buffer)
    with folder:
        folder.finish("complete", SAMPLES.path)
    run = mgpu_ddp.open(tmp_path)
    assert run.errors() == [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    assert len(run.errors()) == len(FAILED)
    assert run.table()["path"].to_pylist() == [path.decode() for path in paths]
    assert run.table()["label"].null_count == (0 if how == "npy" else 5)


def test_an_array_is_mapped_and_ends_at_the_prefix(tmp_path: Path) -> None:
    classes_in(tmp_path, "npy", 12)
    table = mgpu_ddp.open(tmp_path).table()
    assert table.column_names == ["index", "path", "label", "logits", "error"]
    expected = make_rows(0, 12).columns["logits"]
    assert isinstance(expected, np.ndarray)
    found = table["logits"].combine_chunks()
    assert np.array_equal(np.stack([row.values.to_numpy() for row in found if row.is_valid]), np.delete(expected, 3, 0))
    assert table["error"][3].as_py().startswith("ValueError")


def test_a_data_frame_has_the_rows_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes_in(tmp_path, "parquet", 20)
    run = mgpu_ddp.open(tmp_path)
    frame = run.to_pandas()
    assert frame["pred"].dropna().astype(int).tolist() == run.table()["pred"].drop_null().to_pylist()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match="to_pandas needs the package pandas"):
        run.to_pandas()


def test_what_a_notebook_shows_is_escaped(tmp_path: Path) -> None:
    manifest = manifest_of("parquet", make_rows(0, 1).columns)
    manifest.fingerprint |= {"model.name": "<script>", "data.root": "a & b"}
    claim(tmp_path, manifest=manifest).mark_running()
    shown = mgpu_ddp.open(tmp_path)._repr_html_()
    assert "&lt;script&gt;" in shown
    assert "a &amp; b" in shown
    assert "<script" not in shown
    assert "<td>0 of 20</td>" in shown


@pytest.mark.parametrize("name", ["nothing", "empty", "file", "foreign", "old"])
def test_what_is_no_run_folder_is_told_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "manifest.json").write_text('{"files": []}')
    claim(tmp_path / "old")
    with pytest.raises(UsageError, match="manifest") as caught:
        mgpu_ddp.open(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_part_that_is_gone_is_named(tmp_path: Path) -> None:
    folder = classes_in(tmp_path, "csv", 12, 20)
    (tmp_path / folder.claimed.parts[1].file).unlink()
    with pytest.raises(StateError, match=f"{PARTS}/part-000000000012-t.csv is not as it was committed"):
        Run(folder=tmp_path).table()
