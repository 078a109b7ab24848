"""Parquet: images of any column of bytes are found and read, and what is broken is one line."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mgpu_ddp.data import parquet, row_group_cache
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import OutOfMemoryError, UsageError
from tests.support.loading import load_all
from tests.support.samples import encoded, photo
from tests.support.sources import parquet_of, parquet_samples

JPEG = encoded(photo(20, 20), "JPEG")
CONTENT = [b"a" * 10, b"", b"ccc", b"a" * 10, None, b"f" * 5000, b"g"]


@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct"])
@pytest.mark.parametrize("group", [1, 3, 100])
def test_images_of_a_parquet_file_whatever_their_column(tmp_path: Path, world: World, kind: str, group: int) -> None:
    image: Any = pa.array(CONTENT, pa.binary() if kind == "binary" else pa.large_binary())
    if kind == "struct":
        image = pa.array([{"path": f"{i}.jpg", "bytes": content} for i, content in enumerate(CONTENT)])
    parquet_of(tmp_path / "a.parquet", group, image=image, label=[3, -1, None, 0, 1, 2, 9])
    parquet_of(tmp_path / "b.parquet", group, image=image.slice(0, 0), label=pa.array([], pa.int64()))
    parquet_of(tmp_path / "c.parquet", group, image=image, label=pa.array([1] * 7, pa.uint8()))
    samples = parquet_samples(tmp_path / "{a,b,c}.parquet", world, label_column="label")
    names = [f"{name}.parquet/{row}" for name in "ac" for row in range(7)]
    assert [samples.path(i) for i in range(14)] == names
    assert [samples.known_label(i) for i in range(7)] == [3, -1, -1, 0, 1, 2, 9]
    for index in (*range(14), *reversed(range(14)), 0, 13, 1):
        if CONTENT[index % 7] is None:
            with pytest.raises(ValueError, match="null in the place of an image"):
                samples.fetch(index)
        else:
            assert samples.fetch(index) == CONTENT[index % 7]


def test_keys_name_the_rows(tmp_path: Path, world: World) -> None:
    struct = pa.array([{"bytes": b"x", "path": "one.jpg"}, {"bytes": b"y", "path": None}, None])
    path = parquet_of(
        tmp_path / "x.parquet", image=struct, number=[5, None, 7], raw=[b"\xff", b"b", b"c"], z=[0.5, 1, 2]
    )
    shown = {
        None: ["x.parquet/0", "x.parquet/1", "x.parquet/2"],
        "image.path": ["one.jpg", "x.parquet/1", "x.parquet/2"],
    }
    shown |= {"number": ["5", "x.parquet/1", "7"], "raw": ["\\udcff", "b", "c"]}
    for key, names in shown.items():
        samples = parquet_samples(path, world, key_column=key)
        assert [samples.path(i) for i in range(3)] == names
    with pytest.raises(ValueError, match="null"):
        samples.fetch(2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"column": "photo"}, "data.column must be one column of every file, got 'photo'"),
        ({"column": "word"}, "data.column must be a column of bytes or of a struct with bytes, got string"),
        ({"label_column": "class"}, "data.label_column must be one column of every file, got 'class'"),
        ({"label_column": "image"}, "holds binary, not whole numbers"),
        ({"key_column": "half"}, "data.key_column must be a column of text, bytes or whole numbers, got double"),
        ({"key_column": "image.path"}, "data.key_column must be one column of every file"),
    ],
)
def test_a_missing_or_odd_column_is_one_line(tmp_path: Path, world: World, settings: dict[str, Any], said: str) -> None:
    path = parquet_of(tmp_path / "x.parquet", image=[b"x"], word=["w"], half=[0.5])
    with pytest.raises(UsageError) as raised:
        parquet_samples(path, world, **settings)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("times", "error", "said"),
    [
        (1, UsageError, "its row groups have not as many rows as it says"),
        (-1, OutOfMemoryError, "data.urls must fit into memory, got '"),
    ],
    ids=["against itself", "throughout"],
)
def test_a_footer_that_lies_about_its_rows_is_one_line(
    tmp_path: Path, world: World, times: int, error: type[Exception], said: str
) -> None:
    path = parquet_of(tmp_path / "x.parquet", image=[b"x"] * 3)
    data = path.read_bytes()
    size = int.from_bytes(data[-8:-4], "little")
    before, footer = data[: -8 - size], data[-8 - size : -8]
    # The file's number of rows comes first. 64-bit numbers are zigzag, in groups of seven bits.
    footer = footer.replace(b"\x16\x06", b"\x16\xfe\xff\xff\xff\xff\x3f", times)
    path.write_bytes(before + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(error) as raised:
        parquet_samples(path, world)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_column_that_is_there_twice_is_one_line(tmp_path: Path, world: World) -> None:
    names = ["image", "image", "key", "key"]
    table = pa.table([pa.array([b"x"]), pa.array([b"y"]), pa.array(["k"]), pa.array(["l"])], names=names)
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UsageError, match=r"^data\.column must be one column of every file, got 'image'.*Rename"):
        parquet_samples(tmp_path / "x.parquet", world)
    pq.write_table(table.select([0, 2, 3]), tmp_path / "x.parquet")
    with pytest.raises(UsageError, match=r"^data\.key_column must be one column of every file, got 'key'"):
        parquet_samples(tmp_path / "x.parquet", world, key_column="key")


def test_nested_keys_and_images_in_dictionaries_or_views(tmp_path: Path, world: World) -> None:
    images = [b"one", None, b"two", b"one"]
    for kind in (pa.dictionary(pa.int32(), pa.binary()), pa.binary_view(), pa.binary(3)):
        image = pa.array(images, pa.binary()).cast(kind)
        nested = pa.array([{"a": {"b": f"k{i}"}} for i in range(4)])
        pq.write_table(pa.table({"image": image, "m": nested}), tmp_path / "x.parquet", row_group_size=3)
        samples = parquet_samples(tmp_path / "x.parquet", world, key_column="m.a.b")
        assert [samples.path(i) for i in range(4)] == ["k0", "k1", "k2", "k3"]
        assert [samples.fetch(i) for i in (0, 2, 3)] == [b"one", b"two", b"one"]
        with pytest.raises(ValueError, match="null"):
            samples.fetch(1)


def test_a_torn_file_is_one_line(tmp_path: Path, world: World) -> None:
    for name in "ab":
        parquet_of(tmp_path / f"{name}.parquet", image=[b"x"])
    torn = tmp_path / "b.parquet"
    torn.write_bytes(torn.read_bytes()[:-20])
    with pytest.raises(UsageError, match=rf"^data\.urls: '{torn}' cannot be read \(") as raised:
        parquet_samples(tmp_path / "*.parquet", world)
    assert "\n" not in str(raised.value)


def test_a_broken_row_group_costs_its_own_rows_alone(tmp_path: Path, world: World) -> None:
    path = parquet_of(tmp_path / "x.parquet", 4, image=[JPEG + bytes([i]) for i in range(12)])
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    first = chunk.dictionary_page_offset or chunk.data_page_offset
    data[first + 40 : first + 200] = bytes(160)
    path.write_bytes(data)
    errors = load_all(parquet_samples(path, world), world).errors
    assert sorted(errors) == [4, 5, 6, 7]
    assert all(reason.startswith("OSError: row group 1 cannot be read (") for reason in errors.values())


@pytest.mark.parametrize("shared", [0, 1 << 12, 1 << 30], ids=["nothing shared", "too large to share", "shared"])
def test_repeated_images_need_more_room_than_their_file_says(
    tmp_path: Path, world: World, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_group_cache, "SHARED_BYTES", shared)
    # One entry of a dictionary, many times.
    path = parquet_of(tmp_path / "x.parquet", 50, image=[JPEG] * 100)
    samples = parquet_samples(path, world)
    assert [samples.fetch(i) for i in (0, 99, 50, 49, 0)] == [JPEG] * 5


def test_a_block_smaller_than_a_row_group_is_said(
    tmp_path: Path, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    files = parquet_samples(parquet_of(tmp_path / "x.parquet", 4, image=[b"x"] * 9), world).files
    parquet.advise_block(files, 4)
    assert "loader.block" not in caplog.text
    parquet.advise_block(files, 3)
    assert (
        "loader.block=3 deals the rows of one row group to several ranks, and each reads all of it: try 40"
        in caplog.text
    )
