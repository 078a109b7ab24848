"""Lists of images: what they name, in their order, and one line for each that cannot be read."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mgpu_ddp.config.schema import ListConfig
from mgpu_ddp.data.files import FileSamples
from mgpu_ddp.data.list_file import read_list
from mgpu_ddp.data.listing import Listing
from mgpu_ddp.errors import UsageError

WIDE = ("utf-16", "utf-16-le", "utf-16-be", "utf-32")


def rows(files: Listing) -> list[tuple[bytes, int]]:
    return [(files.path(i), files.label(i)) for i in range(len(files))]


def listed(path: Path, content: bytes) -> Listing:
    path.write_bytes(content)
    return read_list(ListConfig(path=str(path)))


def test_a_text_names_one_path_a_line_whatever_its_bytes(tmp_path: Path) -> None:
    content = b'"b", 1.jpg\na.jpg\r\n\n/abs\xff.png\na.jpg\n 2.png'
    files = listed(tmp_path / "images.txt", content)
    assert [path for path, _ in rows(files)] == [b'"b", 1.jpg', b"a.jpg", b"/abs\xff.png", b"a.jpg", b" 2.png"]
    assert {label for _, label in rows(files)} == {-1}


def test_lines_of_blanks_are_no_paths_and_blanks_around_names_of_columns_no_matter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert [path for path, _ in rows(listed(tmp_path / "list", b"a.jpg \n  \n\t\r\n b.jpg\n"))] == [
        b"a.jpg ",
        b" b.jpg",
    ]
    assert rows(listed(tmp_path / "blanks.csv", b" label ,path , x\n3,a.jpg,1\n")) == [(b"a.jpg", 3)]
    pq.write_table(pa.table({"label ": [4], "path": ["a.jpg"]}), tmp_path / "blanks.parquet")
    assert rows(read_list(ListConfig(path=str(tmp_path / "blanks.parquet")))) == [(b"a.jpg", 4)]
    assert "not taken" not in caplog.text
    assert rows(listed(tmp_path / "near.csv", b"path,Labels\na.jpg,1\n")) == [(b"a.jpg", -1)]
    assert "column 'Labels' is not taken for labels: call it label" in caplog.text


def test_csv_and_parquet_have_columns(tmp_path: Path) -> None:
    wanted = [(b"x/a.jpg", 3), (b'q"u,o\nte.jpg', -1), (b"x/a.jpg", -1), (b"0", 0)]
    text = b'other,label,path\n1,3,x/a.jpg\n2,,"q""u,o\nte.jpg"\n3,-7,x/a.jpg\n4,0,0\n'
    assert rows(listed(tmp_path / "images.csv", text)) == wanted
    table = {
        # As pandas writes whole numbers of which some are missing.
        "label": pa.array([3.0, float("nan"), -1.0, 0.0]),
        "path": [path.decode() for path, _ in wanted],
        "o": [1] * 4,
    }
    pq.write_table(pa.table(table), tmp_path / "images.PARQUET", row_group_size=2)
    assert rows(read_list(ListConfig(path=str(tmp_path / "images.PARQUET")))) == wanted
    assert [label for _, label in rows(listed(tmp_path / "no label.csv", b"path\na.jpg\n"))] == [-1]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.csv", None, "cannot be read ("),
        ("empty.txt", b"", "cannot be read ("),
        ("empty.csv", b"path,label\n", "names no image"),
        ("other.csv", b"file,label\na.jpg,1\n", "has no column path, but '"),
        ("other.parquet", {"file": ["a"]}, "has no column path, but '"),
        ("none.parquet", {"path": ["a", None]}, "has 1 rows without a path"),
        ("none.csv", b"path,label\na.jpg,1\n,2\n  ,3\n", "has 2 rows without a path"),
        ("number.parquet", {"path": [1, 2]}, "has int64 in its column path, not text"),
        ("struct.parquet", {"path": [{"path": "a"}]}, "has struct"),
        ("twice.csv", b"path, path\na,b\n", "a list with one column path and one label, got ['path', ' path']"),
        ("tabs.csv", b"path\tlabel\na\t1\n", "Separate columns by commas."),
        ("semicolons.csv", b"path;label\na;1\n", "but 'path;label'. Separate columns by commas."),
        ("list.tsv", b"path\tlabel\na\t1\n", "or a text of one path a line, got"),
        ("list.csv.gz", b"\x1f\x8b", "or a text of one path a line, got"),
        ("times.parquet", {"path": ["a"], "label": [b"cat"]}, "holds binary, not whole numbers"),
        ("halves.csv", b"path,label\na.jpg,0.5\n", "holds no class numbers: Float value 0.5"),
        ("infinite.parquet", {"path": ["a"], "label": [float("inf")]}, "holds no class numbers: "),
        ("large.csv", b"path,label\na.jpg,3000000000\n", "holds no class numbers: "),
        ("torn.parquet", b"PAR1", "cannot be read ("),
        *((f"{kind}.csv", "path,label\na.jpg,1\n".encode(kind), "a text in UTF-8, got ") for kind in WIDE),
        *((f"{kind}.txt", "a.jpg\nb.jpg\n".encode(kind), "a text in UTF-8, got ") for kind in WIDE),
        ("latin.csv", "path,größe\na.jpg,1\n".encode("latin-1"), "cannot be read ('utf-8' codec"),
        ("ragged.csv", b"path,label\na.jpg,1\nb.jpg\n", "cannot be read ("),
    ],
)
def test_what_is_no_list_is_refused_in_one_line(tmp_path: Path, name: str, content: Any, said: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        pq.write_table(pa.table(content), path)
    with pytest.raises(UsageError) as raised:
        read_list(ListConfig(path=str(path)))
    assert said in str(raised.value)
    assert "data.path" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_paths_are_relative_to_the_root_and_only_files_are_read(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    (root / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two")
    os.mkfifo(root / "pipe")
    config = ListConfig(path=str(tmp_path / "list.txt"), root=str(root))
    (tmp_path / "list.txt").write_text(f"a\n{tmp_path}/b\na\npipe\n/dev/zero\n.\n")
    samples = FileSamples(str(config.root), read_list(config))
    assert [samples.fetch(i) for i in range(3)] == [b"one", b"two", b"one"]
    assert [samples.path(i) for i in range(2)] == ["a", f"{tmp_path}/b"]
    for index in (3, 4, 5):
        with pytest.raises(OSError, match=r"not a regular file|Is a directory"):
            samples.fetch(index)
    assert ListConfig(path=f"{tmp_path}/list.txt").root == str(tmp_path)
