"""Boxes as lists and Parquet files have them, and as pixels of an image."""

import math
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mgpu_ddp.config.schema import ListConfig, ParquetConfig
from mgpu_ddp.data.boxes import window_of
from mgpu_ddp.data.encoded import EncodedSamples
from mgpu_ddp.data.list_file import read_list
from mgpu_ddp.data.listing import Listing
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import UsageError
from tests.support.samples import ignore_time
from tests.support.sources import list_source, parquet_of

BOXES = [[[0.0, 1.0, 5.5, 6.0], [2.0, 2.0, 9.0, 3.0]], [], [[-1.0, 0.0, 4.0, 1e308]], [[3.0, 3.0, 1.0, math.nan]]]
STRUCTS = [[dict(zip(("x0", "y0", "x1", "y1"), box, strict=True)) for box in boxes] for boxes in BOXES]
ROWS = [0, 0, 2, 3]
FLOATS = pa.list_(pa.float64())
STRUCT = pa.struct([(name, pa.float32()) for name in ("y1", "x0", "x1", "y0")])


def flat(boxes: list[list[list[float]]]) -> Any:
    return np.array([box for each in boxes for box in each])


def listed(path: Path, text: str, **settings: Any) -> Listing:
    path.write_text(text)
    return read_list(ListConfig(path=str(path), **settings))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pa.list_(FLOATS), BOXES),
        (pa.large_list(pa.list_(pa.float32(), 4)), [boxes or None for boxes in BOXES]),
        (pa.list_(pa.list_(pa.float64(), 4)), BOXES),
        (pa.list_(pa.struct([(name, pa.float64()) for name in ("x0", "y0", "x1", "y1")])), STRUCTS),
        (pa.string(), [str(boxes).replace("nan", "NaN") if boxes else "" for boxes in BOXES]),
        (pa.dictionary(pa.int32(), pa.string()), [str(boxes).replace("nan", "NaN") for boxes in BOXES]),
    ],
)
def test_each_box_of_an_image_is_a_row(tmp_path: Path, kind: pa.DataType, values: list[Any]) -> None:
    columns = {"path": [f"{i}.jpg" for i in range(4)], "label": [7, 8, 9, None], "found": pa.array(values, kind)}
    files = read_list(ListConfig(path=str(parquet_of(tmp_path / "list.parquet", **columns)), box_column="found"))
    assert [files.path(row) for row in range(len(files))] == [b"%d.jpg" % row for row in ROWS]
    assert [files.label(row) for row in range(len(files))] == [7, 7, 9, -1]
    assert files.boxes is not None
    wanted = pa.array(flat(BOXES).reshape(-1))
    if "fixed_size_list<item: float>" in str(kind):
        wanted = wanted.cast(pa.float32(), safe=False)
    assert np.array_equal(files.boxes.reshape(-1), wanted.to_numpy(), equal_nan=True)
    assert files.left_out == {"without boxes": 1}


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (FLOATS, [[1, 2, 3, 4], None, [], [5, 6, 7, 8]]),
        (pa.list_(pa.int16(), 4), [[1, 2, 3, 4], None, None, [5, 6, 7, 8]]),
        (STRUCT, [{"x0": 1, "y0": 2, "x1": 3, "y1": 4}, None, None, {"x0": 5, "y0": 6, "x1": 7, "y1": 8}]),
        (pa.string(), ["[1, 2, 3, 4]", None, " ", "[5,6,7,8.0]"]),
    ],
)
def test_a_row_may_hold_one_box(tmp_path: Path, kind: pa.DataType, values: list[Any]) -> None:
    columns = {"path": [f"{i}.jpg" for i in range(4)], "box": pa.array(values, kind)}
    files = read_list(ListConfig(path=str(parquet_of(tmp_path / "list.parquet", **columns)), box_column="box"))
    assert [files.path(row) for row in range(len(files))] == [b"0.jpg", b"3.jpg"]
    assert files.boxes is not None
    assert files.boxes.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert files.left_out == {"without boxes": 2}


def test_four_columns_of_a_csv_are_a_box(tmp_path: Path) -> None:
    text = "left,path,top,right,bottom\n1,a.jpg,2,3.5,4\n 5 ,a.jpg,6,7,8\n,b.jpg,,,\n"
    files = listed(tmp_path / "list.csv", text, box_column=["left", "top", "right", "bottom"])
    assert [files.path(row) for row in range(len(files))] == [b"a.jpg", b"a.jpg"]
    assert files.boxes is not None
    assert files.boxes.tolist() == [[1, 2, 3.5, 4], [5, 6, 7, 8]]
    assert files.left_out == {"without boxes": 1}


def test_images_are_looked_at_once_and_their_boxes_know_it(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    text = 'path,box\na.png,"[[0,0,1,1],[0,0,2,2]]"\nb.png,"[0,0,1,1]"\n'
    files = listed(tmp_path / "list.csv", text, box_column="box", check="hash")
    hashes = files.table["sha256"].to_pylist()
    assert hashes[0] == hashes[1] is not None
    assert hashes[2] is None


def test_another_box_is_another_dataset_and_more_boxes_at_the_end_are_more_rows(tmp_path: Path) -> None:
    first = 'path,box\na.png,"[[0,0,1,1],[0,0,2,2]]"\n'
    before = listed(tmp_path / "list.csv", first, box_column="box")
    data = ListConfig(path=str(tmp_path / "list.csv"), box_column="box")
    assert read_list(data, before).digest(2) == before.digest(2)
    (tmp_path / "list.csv").write_text(first + 'b.png,"[1,1,2,2]"\n')
    grown = read_list(data, before)
    assert (len(grown), grown.digest(2)) == (3, before.digest(2))
    (tmp_path / "list.csv").write_text(first.replace("0,0,2,2", "0,0,2,3"))
    assert read_list(data, before).digest(2) != before.digest(2)


@pytest.mark.parametrize(
    "cell",
    [
        "[[1,2,3]]",
        "[1,2,3,4,5]",
        "[[1,2,3,4],[1,2]]",
        "[[1,2,3,4],5,6,7]",
        '["1","2","3","4"]',
        "[[1,2,null,4]]",
        "[[[1,2,3,4]]]",
        "[true,1,2,3]",
        "dog",
        "7",
        '{"x0": 1}',
        "[1,2,3,1" + "0" * 400 + "]",
        "[" * 100_000,
    ],
)
def test_a_wrong_cell_is_told_with_its_line(tmp_path: Path, cell: str) -> None:
    lines = [f'{i}.jpg,"[[{i},0,{i + 1},9]]"' for i in range(900)]
    lines[810] = '810.jpg,"{}"'.format(cell.replace('"', '""'))
    with pytest.raises(UsageError) as caught:
        listed(tmp_path / "list.csv", "\n".join(["path,box", *lines, ""]), box_column="box")
    said = str(caught.value)
    assert said.startswith("data.box_column must hold boxes of four numbers, [x0,y0,x1,y1] or a list of these, got ")
    assert said.endswith(f" in line 812 of '{tmp_path}/list.csv'. Correct it.")
    assert len(said) < 400


def test_the_line_is_that_of_the_file_whatever_stands_before(tmp_path: Path) -> None:
    text = 'path,box\n\n"two\nlines.jpg","[0,0,1,1]"\nc.jpg,"[1]"\n'
    with pytest.raises(UsageError, match=r"in line 5 of"):
        listed(tmp_path / "list.csv", text, box_column="box")


@pytest.mark.parametrize(("row", "shown"), [("a.jpg,1,x,3,4", "'x'"), ("a.jpg,1,,3,4", "[1.0, None, 3.0, 4.0]")])
def test_a_wrong_number_is_told_with_its_line(tmp_path: Path, row: str, shown: str) -> None:
    text = f"path,x0,y0,x1,y1\nb.jpg,1,2,3,4\n{row}\n"
    with pytest.raises(UsageError) as caught:
        listed(tmp_path / "list.csv", text, box_column=["x0", "y0", "x1", "y1"])
    assert f"got {shown} in line 3 of" in str(caught.value)


@pytest.mark.parametrize(
    ("column", "line"),
    [
        (pa.array([[[1, 2, 3, 4]], [[1, 2, 3]]], pa.list_(FLOATS)), "got [[1.0, 2.0, 3.0]] in row 1 of"),
        (pa.array([[[1, 2, 3, 4]], [[1, 2, None, 3]]], pa.list_(FLOATS)), "got [[1.0, 2.0, None, 3.0]] in row 1 of"),
        (pa.array([[[1, 2, 3, 4]], [None]], pa.list_(FLOATS)), "got [None] in row 1 of"),
        (pa.array([[], [{"x0": 1, "y0": 2, "x1": 3}]]), "must be a column of JSON, lists or structs, or four of"),
        (pa.array([[["a"] * 4]] * 2), "must be a column of JSON, lists or structs, or four of numbers, got 'list<"),
        (pa.array([1, 2]), "must be a column of JSON, lists or structs, or four of numbers, got 'int64'"),
        (pa.array([[[[1.0] * 4]]] * 2), "must be a column of JSON, lists or structs, or four of numbers, got 'list<"),
        (pa.array([None, None], pa.null()), "must be a column with boxes, got 'none in any row'"),
    ],
)
def test_wrong_lists_are_told_in_one_line(tmp_path: Path, world: World, column: Any, line: str) -> None:
    path = parquet_of(tmp_path / "boxes.parquet", path=["a", "b"], image=[b"", b""], boxes=column)
    with pytest.raises(UsageError) as caught:
        read_list(ListConfig(path=str(path), box_column="boxes"))
    assert line in str(caught.value)
    with pytest.raises(UsageError) as caught:
        list_source(ParquetConfig(urls=str(path), box_column="boxes"), world)
    assert line in str(caught.value)


@pytest.mark.parametrize("name", ["found", "path"])
def test_a_column_that_is_not_there_is_told(tmp_path: Path, world: World, name: str) -> None:
    path = parquet_of(tmp_path / "boxes.parquet", path=["a"], image=[b""], boxes=[[1]])
    with pytest.raises(UsageError, match=r"data.box_column must be among image, boxes, got"):
        read_list(ListConfig(path=str(path), box_column=name))
    if name == "found":
        with pytest.raises(UsageError, match=r"data.box_column must be one column of every file, among path, image, "):
            list_source(ParquetConfig(urls=str(path), box_column=name), world)


def test_a_text_has_no_boxes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data.box_column must be null for a text of one path a line"):
        listed(tmp_path / "list.txt", "a.jpg\n", box_column="box")


@pytest.mark.parametrize("value", ["", [], ["a", "b"], ["a", "a", "b", "c"], ["a", "b", "c", 1], 7])
def test_the_key_names_one_column_or_four(value: Any) -> None:
    with pytest.raises(UsageError, match=r"data.box_column must be the name of one column or of four, or null, got"):
        ParquetConfig(urls="x.parquet", box_column=value)


def test_boxes_of_parquet_follow_their_row_groups(tmp_path: Path, world: World) -> None:
    counts = [2, 0, 3, 0, 0, 0, 1]
    boxes = [[[i, 0, i + 1, k + 1] for k in range(count)] for i, count in enumerate(counts)]
    for name in ("a", "b"):
        parquet_of(tmp_path / f"{name}.parquet", image=[b"%d" % i for i in range(7)], boxes=boxes)
    files = list_source(ParquetConfig(urls=f"{tmp_path}/*.parquet", box_column="boxes"), world)
    owners = [i for i, count in enumerate(counts) for _ in range(count)]
    names = [b"%s.parquet/%d" % (name, i) for name in (b"a", b"b") for i in owners]
    assert [files.path(row) for row in range(12)] == names
    assert [archive.rows for archive in files.archives] == [[5, 0, 1]] * 2
    assert files.left_out == {"without boxes": 8}
    from mgpu_ddp.data.parquet import ParquetSamples

    samples = ParquetSamples(files, "image")
    assert [samples.fetch(row) for row in range(12)] == [b"%d" % i for i in owners] * 2
    assert len({samples.image_of(row) for row in range(12)}) == 6


@pytest.mark.parametrize("size", [(10, 7), (1, 1), (3, 4)])
def test_a_window_is_the_crop_of_pillow(size: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    halves = random.integers(-4, 24, (300, 4)) / 2
    cut = 0
    for box in [*halves.tolist(), *random.uniform(-2, 12, (300, 4)).tolist()]:
        rounded = [*map(round, box)]
        limits = [max(rounded[0], 0), max(rounded[1], 0), min(rounded[2], size[0]), min(rounded[3], size[1])]
        if limits[0] >= limits[2] or limits[1] >= limits[3]:
            with pytest.raises(ValueError, match=f"has no pixel of the image, which is {size[0]}x{size[1]}$"):
                window_of(box, *size)
            continue
        window, is_clipped = window_of(box, *size)
        assert is_clipped == (limits != rounded)
        cut += is_clipped
        if not is_clipped:
            assert np.array_equal(image.crop(tuple(box)), image.crop(window))  # type: ignore[arg-type]
        assert list(window) == limits
    assert cut


@pytest.mark.parametrize(
    "box", [[math.nan, 0, 1, 1], [5, 5, 5, 9], [6, 5, 5, 9], [1e308, 0, math.inf, 1], [0, 0, 0.4, 1], [-5, -5, -1, -1]]
)
def test_an_empty_box_has_a_reason(box: list[float]) -> None:
    with pytest.raises(ValueError, match=r"^the box \[.*\] has no pixel of the image, which is 9x9$"):
        window_of(box, 9, 9)


def test_a_box_without_end_is_the_whole_image() -> None:
    assert window_of([-math.inf, -1e308, math.inf, 1e308], 9, 8) == ((0, 0, 9, 8), True)


def test_a_listing_of_boxes_can_be_opened_again(tmp_path: Path) -> None:
    files = listed(tmp_path / "list.csv", 'path,box\na.jpg,"[0,0,1,1]"\n', box_column="box")
    (tmp_path / "listing.arrow").write_bytes(files.buffer)
    again = Listing.open(tmp_path / "listing.arrow")
    assert again.boxes is not None
    assert again.boxes.tolist() == [[0, 0, 1, 1]]
    pq.write_table(again.table, tmp_path / "listing.parquet")


def test_an_image_far_away_is_asked_for_once(tmp_path: Path) -> None:
    two = '"[[0,0,1,1],[0,0,2,2]]"'
    text = f'path,box\na,"[0,0,1,1]"\na,{two}\nb,{two}\nc,"[1,1,2,2]"\n'
    files = listed(tmp_path / "list.csv", text, box_column="box")
    asked: list[int] = []

    def request(index: int) -> Future[bytes]:
        asked.append(index)
        done: Future[bytes] = Future()
        done.set_result(files.path(index))
        return done

    class Remote(EncodedSamples):
        def fetch(self, index: int) -> bytes:
            raise AssertionError("fetched")

    samples = Remote(files, request)
    found = []
    for order, then in (([0, 1], [2, 3]), ([2, 3], [4, 5]), ([4, 5], [])):
        samples.expect([*order, *then])
        found += [samples.read(index, ignore_time) for index in order]
    assert found == [files.path(index) for index in range(6)]
    assert asked == [0, 3, 5]
