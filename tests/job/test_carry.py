"""`data.carry` over the life of a job: errors, retries, replaced images, growth, shards and hostile names."""

import csv
import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import mgpu_ddp
from mgpu_ddp.config.command_line import check_command
from mgpu_ddp.config.compose import compose_config
from mgpu_ddp.config.schema import ListConfig, ParquetConfig, ScriptModelConfig
from mgpu_ddp.config.script import Script
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import StateError, UsageError
from mgpu_ddp.merge import merge
from mgpu_ddp.notebook import words_of
from tests.support.carrying import carried_by, csv_list, parquet_list, parquet_source, values_of
from tests.support.runs import make_images, read_rows
from tests.support.worlds import run_job, tiny

COUNT = 9
HOSTILE = (
    "",
    "  ",
    "a,b",
    'say "hi"',
    "new\nline",
    "\x1b[31mred",
    "../../etc/passwd",
    "<script>alert(1)</script>",
    "é☃",
)
HOSTILE += (
    "index",
    "path",
    "pred",
    "topk_index",
    "topk_new",
    "error",
    "width",
    "source_index",
    "a.b",
    "x" * 5000,
    "=1+1",
)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return make_images(tmp_path / "images", COUNT)


def carry(data: Any, run_dir: Path, world: World, how: str = "parquet", **changes: Any) -> Any:
    """Run a job and return its table."""
    run_job(tiny(data=data, output={"format": how, "commit_every": 4}, **changes), run_dir, world)
    return mgpu_ddp.open(run_dir).table()


BOXES = [[[0, 0, 9, 9 + number]] * (number % 3) for number in range(COUNT)]
OWNERS = [number for number in range(COUNT) for _ in BOXES[number]]


@pytest.mark.parametrize("make", [parquet_list, parquet_source])
def test_each_box_of_an_image_has_what_the_image_carries(
    images: list[Path], tmp_path: Path, world: World, make: Any
) -> None:
    data = make(tmp_path if make is parquet_source else tmp_path / "list.parquet", images)
    first = 0
    for path in sorted(tmp_path.glob("*.parquet")):
        table = pq.read_table(path)
        column = pa.array(BOXES[first : first + len(table)], pa.list_(pa.list_(pa.int64())))
        first += len(table)
        pq.write_table(table.append_column("places", column), path, row_group_size=4)
    table = carry(replace(data, box_column=["places"]), tmp_path / "run", world)
    assert table["box"].to_pylist() == [[0, 0, 9, 9 + number] for number in OWNERS]
    assert carried_by(table) == [values_of(number) for number in OWNERS]


def test_boxes_in_a_csv_carry_as_well(images: list[Path], tmp_path: Path, world: World) -> None:
    columns = {"note": [f"0{number}" for number in range(COUNT)], "places": [json.dumps(each) for each in BOXES]}
    data = replace(csv_list(tmp_path / "list.csv", images, columns), box_column=["places"])
    table = carry(data, tmp_path / "run", world)
    assert table["box"].to_pylist() == [[0, 0, 9, 9 + number] for number in OWNERS]
    assert table["note"].to_pylist() == [f"0{number}" for number in OWNERS]
    assert table["places"].to_pylist() == [json.dumps(BOXES[number]) for number in OWNERS]


@pytest.mark.parametrize("how", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("make", [parquet_list, parquet_source])
def test_error_rows_retries_and_replaced_images_keep_what_is_carried(
    images: list[Path], tmp_path: Path, world: World, how: str, make: Any
) -> None:
    good = images[2].read_bytes()
    images[2].write_bytes(b"none")
    place = tmp_path if make is parquet_source else tmp_path / "list.parquet"
    data = replace(make(place, images), check="stat")
    table = carry(data, tmp_path / "run", world, how)
    expected = [values_of(number) for number in range(COUNT)]
    assert carried_by(table) == expected
    assert [row["index"] for row in table.to_pylist() if row["error"]] == [2]
    images[2].write_bytes(good)
    make(place, images)
    table = carry(data, tmp_path / "run", world, how, retry_failed=True)
    assert carried_by(table) == expected
    assert table["error"].null_count == COUNT
    images[7].write_bytes(good)
    make(place, images)
    again = carry(data, tmp_path / "run", world, how)
    assert carried_by(again) == expected
    assert again["pred"].null_count == 0
    assert again["prob"][7] == again["prob"][2] != table["prob"][7]


def test_blanked_rows_keep_what_is_carried(images: list[Path], tmp_path: Path, world: World) -> None:
    data = replace(parquet_list(tmp_path / "list.parquet", images), check="stat")
    carry(data, tmp_path / "run", world, "csv")
    images[3].write_bytes(b"no image any more")
    table = carry(data, tmp_path / "run", world, "csv")
    assert table["error"].null_count == COUNT - 1
    assert carried_by(table) == [values_of(number) for number in range(COUNT)]


def test_cells_of_a_csv_are_numbers_only_where_no_digit_would_be_lost(
    images: list[Path], tmp_path: Path, world: World
) -> None:
    columns = {
        "whole": ["1", "-2", "0", None, *"56789"],
        "zip": ["007", *"12345678"],
        "huge": ["18446744073709551615", *"12345678"],
        "real": ["1.5", "-2e3", "0", None, *"56789"],
        "flag": ["true", "False", None, *["TRUE"] * 6],
        "day": ["2020-01-01"] * COUNT,
        "na": ["NA", "nan", *"1234567"],
        "empty": [None] * COUNT,
    }
    table = carry(csv_list(tmp_path / "list.csv", images, columns), tmp_path / "run", world)
    kinds = {name: str(table.schema.field(name).type) for name in columns}
    text = "large_string"
    assert kinds == {"whole": "int64", "zip": text, "huge": text, "real": "double"} | {
        "flag": "bool",
        "day": text,
        "na": text,
        "empty": text,
    }
    assert table["whole"].to_pylist() == [1, -2, 0, None, 5, 6, 7, 8, 9]
    assert table["real"].to_pylist() == [1.5, -2000, 0, None, 5, 6, 7, 8, 9]
    assert table["flag"].to_pylist() == [True, False, None, *[True] * 6]
    for name in ("zip", "huge", "day", "na", "empty"):
        assert table[name].to_pylist() == columns[name]


@pytest.mark.parametrize("how", ["parquet", "csv", "jsonl"])
def test_hostile_names_and_cells_are_text(images: list[Path], tmp_path: Path, world: World, how: str) -> None:
    names = [name for name in HOSTILE if name != "path"]
    cells = {name: [f"{name}={number}\x07'\"<i>" for number in range(COUNT)] for name in names}
    data = csv_list(tmp_path / "list.csv", images, cells)
    table = carry(replace(data, carry=[*names, "path"]), tmp_path / "run", world, how)
    assert len(set(table.column_names)) == len(table.column_names)
    taken = {"index": "source_source_index"} | {
        name: f"source_{name}" for name in ("path", "pred", "topk_index", "topk_new", "error", "width")
    }
    for name in names:
        assert table[taken.get(name, name)].to_pylist() == cells[name], name
    assert table["source_path"].to_pylist() == [str(path) for path in images]
    assert table["index"].to_pylist() == list(range(COUNT))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script>alert" not in page
    assert "<i>" not in page
    if how == "csv":
        with next((tmp_path / "run" / "predictions").iterdir()).open(newline="") as file:
            assert next(csv.reader(file))[3 : 3 + len(HOSTILE)] == [taken.get(name, name) for name in [*names, "path"]]


def test_cells_that_are_not_utf8_and_files_that_are_left_out(images: list[Path], tmp_path: Path, world: World) -> None:
    lines = [b"path,note", *(bytes(path) + b",caf\xe9 %d" % number for number, path in enumerate(images))]
    lines.insert(4, b"notes.txt,none")
    (tmp_path / "list.csv").write_bytes(b"\n".join(lines))
    data = ListConfig(path=str(tmp_path / "list.csv"), extensions=["jpg"], carry=["note"])
    table = carry(data, tmp_path / "run", world)
    assert table["note"].to_pylist() == [
        rf"caf\udce9 {number}" for number, path in enumerate(images) if path.suffix == ".jpg"
    ]


def test_names_are_typed_on_the_command_line_as_predict_does(registered: None) -> None:
    names = [name for name in HOSTILE if "\n" not in name]
    (word,) = words_of("data.carry", names)
    found = compose_config(check_command(["data=list", "data.path=list.csv", word]).argv).data.carry
    assert list(found) == names


def test_names_that_are_ours_are_told_once(
    images: list[Path], tmp_path: Path, world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mgpu_ddp"), "propagate", True)
    cells = {"label": ["0"] * COUNT, "id": list(map(str, range(COUNT)))}
    with caplog.at_level(logging.INFO):
        table = carry(csv_list(tmp_path / "list.csv", images, cells), tmp_path / "run", world)
    assert table["source_label"].to_pylist() == table["label"].to_pylist() == [0] * COUNT
    assert [line for line in caplog.messages if "data.carry" in line] == [
        "data.carry: label as source_label, since the table has columns of these names"
    ]


def test_a_list_may_grow_but_not_change_the_type_of_a_column(
    images: list[Path], tmp_path: Path, world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mgpu_ddp"), "propagate", True)
    path, ids, notes = tmp_path / "list.csv", list(map(str, range(COUNT))), ["a", *[None] * (COUNT - 1)]

    def grown(count: int, ids: list[str], notes: list[str | None]) -> Any:
        data = csv_list(path, images[:count], {"id": ids[:count], "note": notes[:count]})
        return carry(data, tmp_path / "run", world)

    grown(4, ids, notes)
    table = grown(6, ids, notes)
    assert table["id"].to_pylist() == list(range(6))
    assert not [line for line in caplog.messages if "data.carry" in line]
    # What was text stays text; rows that are there keep their values.
    table = grown(7, ["77", *ids[1:]], ["5"] * COUNT)
    assert table["id"].to_pylist() == list(range(7))
    assert table["note"].to_pylist() == ["a", *[None] * 5, "5"]
    assert [line for line in caplog.messages if "data.carry" in line] == [
        f"data.carry: {name!r} has other values than when the job began, whose rows keep theirs"
        for name in ("id", "note")
    ]
    before = read_rows(tmp_path / "run")
    with pytest.raises(UsageError, match=r"columns='id int64, .* there, 'id large_string, .* here"):
        grown(8, [*ids[:7], "x", "y"], notes)
    assert read_rows(tmp_path / "run") == before


def test_other_columns_are_another_job(images: list[Path], tmp_path: Path, world: World) -> None:
    for data in (parquet_list(tmp_path / "list.parquet", images), parquet_source(tmp_path, images)):
        run_dir = tmp_path / data.name
        carry(replace(data, carry=[]), run_dir, world)
        with pytest.raises(UsageError, match=r"data.carry=None there, \['id'\] here"):
            carry(replace(data, carry=["id"]), run_dir, world)
        carry(replace(data, carry=["url", "id"]), tmp_path / f"{data.name}-2", world)
        for others in (["id", "url"], ["url"], []):
            with pytest.raises(UsageError, match=r"output.dir must hold this same job.*data.carry=\['url', 'id'\]"):
                carry(replace(data, carry=others), tmp_path / f"{data.name}-2", world)


def test_shards_are_merged_with_what_they_carry(images: list[Path], tmp_path: Path, world: World) -> None:
    for data in (parquet_list(tmp_path / "list.parquet", images), parquet_source(tmp_path, images)):
        for shard in range(2):
            carry(data, tmp_path / data.name / f"shard-{shard}", world, shard=f"{shard}/2")
        merge(tmp_path / data.name)
        table = mgpu_ddp.open(tmp_path / data.name).table()
        assert carried_by(table) == [values_of(number) for number in range(COUNT)]


@pytest.mark.parametrize("how", ["parquet", "csv", "jsonl"])
def test_texts_of_a_megabyte_are_carried(images: list[Path], tmp_path: Path, world: World, how: str) -> None:
    texts = [chr(97 + number) * (1 << 20) + ",\n" for number in range(COUNT)]
    pq.write_table(
        pa.table({"image": [path.read_bytes() for path in images], "text": texts}), tmp_path / "1.parquet", 4
    )
    data = ParquetConfig(urls=str(tmp_path / "1.parquet"), carry=["text"])
    assert carry(data, tmp_path / "parquet", world, how)["text"].to_pylist() == texts
    table = carry(csv_list(tmp_path / "list.csv", images, {"text": texts}), tmp_path / "list", world, how)
    assert table["text"].to_pylist() == texts
    assert (tmp_path / "list" / "report.html").stat().st_size < 1 << 20


class Mean(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"mean": images.mean((1, 2, 3))}


def test_the_page_shows_what_is_carried_beside_columns_of_ones_own(
    images: list[Path], tmp_path: Path, world: World
) -> None:
    texts = [f"<u>{number} {'x' * (1 << 20)}" for number in range(COUNT)]
    data = csv_list(tmp_path / "list.csv", images, {"mean": texts, "id": list(map(str, range(COUNT)))})
    config = tiny(data=data, model=ScriptModelConfig())
    run_job(config, tmp_path / "run", world, Script(model=Mean))
    table = mgpu_ddp.open(tmp_path / "run").table()
    assert table["source_mean"].to_pylist() == texts
    page = (tmp_path / "run" / "report.html").read_text()
    assert "source_mean &lt;u&gt;0 xxx" in page
    assert "id 0" in page
    assert "<u>0" not in page
    assert len(page) < 1 << 18


def test_a_file_without_the_column_or_with_another_type_is_one_line(
    images: list[Path], tmp_path: Path, world: World
) -> None:
    cells = {"id": list(map(str, range(COUNT))), "twice": ["a"] * COUNT}
    listed = csv_list(tmp_path / "list.csv", images, cells)
    listed_twice = tmp_path / "twice.csv"
    listed_twice.write_text("path,a,a\nx.jpg,1,2\n")
    text = tmp_path / "list.txt"
    text.write_text("x.jpg\n")
    source = parquet_source(tmp_path, images)
    other = pq.read_table(tmp_path / "carry-1.parquet").set_column(1, "id", pa.array(["x"] * (COUNT // 2)))
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (tmp_path / "carry-0.parquet").rename(mixed / "0.parquet")
    pq.write_table(other, mixed / "1.parquet")
    pq.write_table(other.drop_columns("id"), tmp_path / "lacking.parquet")
    for data, said in (
        (replace(listed, carry=["x"]), r"'x' of data.path='.*list.csv' is not among 'path', 'id', 'twice'\. Correct"),
        (ListConfig(path=str(listed_twice), carry=["a"]), "'a' of data.path='.*twice.csv' is there twice"),
        (ListConfig(path=str(text), carry=["a"]), r"data.carry must be left out for a text of one path a line, got"),
        (replace(source, urls=str(tmp_path / "lacking.parquet")), "'id' of '.*lacking.parquet' is not among 'image',"),
        (
            replace(source, urls=f"{mixed}/*.parquet"),
            "the column 'id' is int64 in '.*0.parquet', but string in '.*1.parquet'. Write it as one type",
        ),
    ):
        with pytest.raises(UsageError, match=said) as raised:
            carry(data, tmp_path / "run", world)
        assert "\n" not in str(raised.value)
    for how, column in (("csv", "image"), ("jsonl", "image")):
        with pytest.raises(UsageError, match=r"output.format must be parquet for the column 'image' of binary, got"):
            carry(ParquetConfig(urls=str(tmp_path / "lacking.parquet"), carry=[column]), tmp_path / "run", world, how)
    with pytest.raises(UsageError, match=r"data.carry must be left out with output.format=npy"):
        tiny(data=listed, output={"format": "npy"})
    with pytest.raises(UsageError, match=r"data.carry must be names of columns, each once, got"):
        ListConfig(path="list.csv", carry=["a", "a"])
    assert not (tmp_path / "run").exists()


def test_a_broken_column_ends_the_job_in_one_line_and_what_was_committed_stays(
    images: list[Path], tmp_path: Path, world: World
) -> None:
    path, texts = tmp_path / "1.parquet", [f"{number}" * 400 for number in range(COUNT)]
    columns = {"image": [image.read_bytes() for image in images], "text": texts}
    pq.write_table(pa.table(columns), path, 4, use_dictionary=False, compression="none", write_page_checksum=True)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"5" * 300, b"x" * 300))
    data = ParquetConfig(urls=str(path), carry=["text"])
    with pytest.raises(StateError, match=re.escape(f"data.carry: row group 1 of {str(path)!r} cannot be read")):
        carry(data, tmp_path / "run", world)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"
    assert mgpu_ddp.open(tmp_path / "run").table()["text"].to_pylist() == texts[:4]
    path.write_bytes(content)
    assert carry(data, tmp_path / "run", world)["text"].to_pylist() == texts
