"""Labels that are texts: numbered in their order, and stable when more of them come."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mgpu_ddp.config.schema import ListConfig, ParquetConfig
from mgpu_ddp.data import labels
from mgpu_ddp.data.datasets import find_listing
from mgpu_ddp.data.list_file import read_list
from mgpu_ddp.data.listing import Listing
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import UsageError
from tests.support.runs import make_images, read_rows
from tests.support.sources import config_of, parquet_of
from tests.support.worlds import run_job, tiny


def numbers(files: Listing) -> list[int]:
    return [files.label(i) for i in range(len(files))]


def reopened(files: Listing, path: Path) -> Listing:
    path.write_bytes(files.buffer)
    return Listing.open(path)


def test_names_in_a_list_are_numbered_in_their_order(tmp_path: Path) -> None:
    text = "path,label\na.jpg,dog\nb.jpg, cat \nc.jpg,\nd.jpg,dog\ne.jpg,élan\n"
    (tmp_path / "list.csv").write_text(text)
    config = ListConfig(path=str(tmp_path / "list.csv"))
    files = reopened(read_list(config), tmp_path / "listing.arrow")
    assert (files.label_names, numbers(files)) == (["cat", "dog", "élan"], [1, 0, -1, 1, 2])
    # More of them: what is there keeps its number.
    (tmp_path / "list.csv").write_text(text + "f.jpg,bee\ng.jpg,cat\nh.jpg,ant\n")
    grown = read_list(config, files)
    assert (grown.label_names, numbers(grown)[5:]) == (["cat", "dog", "élan", "ant", "bee"], [4, 0, 3])
    assert numbers(grown)[:5] == numbers(files)
    assert grown.digest(5) == files.digest(5)
    # The same numbers of other names are other labels.
    (tmp_path / "list.csv").write_text(text.replace("dog", "eel"))
    other = read_list(config)
    assert numbers(other) == numbers(files)
    assert other.digest(5) != files.digest(5)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_names_in_a_parquet_list(tmp_path: Path, kind: Any) -> None:
    column = pa.array(["b", None, "a"]).cast(kind)
    pq.write_table(pa.table({"path": ["1", "2", "3"], "label": column}), tmp_path / "list.parquet")
    files = read_list(ListConfig(path=str(tmp_path / "list.parquet")))
    assert (files.label_names, numbers(files)) == (["a", "b"], [1, -1, 0])


def test_names_in_parquet_files_have_one_numbering(tmp_path: Path, world: World) -> None:
    none = pa.nulls(1, pa.int64())
    for name, column in {"a": ["dog", "ant"], "b": none, "c": ["cat", None]}.items():
        parquet_of(tmp_path / f"{name}.parquet", image=[b"x"] * len(column), label=column)
    data = ParquetConfig(urls=f"{tmp_path}/*.parquet", label_column="label")
    found = find_listing(config_of(data), None, world)
    assert found is not None
    known = reopened(found, tmp_path / "listing.arrow")
    assert (known.label_names, numbers(known)) == (["ant", "cat", "dog"], [2, 0, -1, 1, -1])
    parquet_of(tmp_path / "d.parquet", image=[b"x"] * 2, label=["bee", "dog"])
    grown = find_listing(config_of(data), known, world)
    assert grown is not None
    assert (grown.label_names, numbers(grown)) == (["ant", "cat", "dog", "bee"], [2, 0, -1, 1, -1, 3, 2])
    assert grown.digest(5) == known.digest(5)
    parquet_of(tmp_path / "e.parquet", image=[b"x"], label=[3])
    with pytest.raises(UsageError, match=r"data\.label_column holds names in some files and numbers in others"):
        find_listing(config_of(data), known, world)


def test_names_reach_the_page_and_the_table_has_numbers(tmp_path: Path, world: World) -> None:
    images = make_images(tmp_path, 4)
    lines = [f"{path},{name}\n" for path, name in zip(images, ("owl", "<b>bee", "owl", ""), strict=True)]
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(lines))
    names = [*(f"class {number}" for number in range(11)), "OWL"]
    (tmp_path / "names.txt").write_text("\n".join(names))
    config = tiny(data=ListConfig(path=str(tmp_path / "list.csv")), model={"class_names": str(tmp_path / "names.txt")})
    summary = run_job(config, tmp_path / "out", world)
    classes = json.loads((tmp_path / "out/classes.json").read_text())
    assert (classes["label_names"], classes["num_labels"]) == (["<b>bee", "owl"], 2)
    assert [row["label"] for row in read_rows(tmp_path / "out")] == [1, 0, 1, None]
    how = "labels with classes of the same name, 1 of them; 1 label not compared"
    assert summary["accuracy"]["how"].startswith(how)
    assert (summary["accuracy"]["labelled"], summary["accuracy"]["compared"]) == (3, 2)
    assert "label &lt;b&gt;bee" in " ".join((tmp_path / "out/report.html").read_text().split()).replace("<bdi>", "")


def test_captions_are_no_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "MOST_NAMES", 2)
    (tmp_path / "list.csv").write_text("path,label\na,one\nb,two\nc,three\n")
    with pytest.raises(UsageError, match="holds 3 different texts, which are no classes"):
        read_list(ListConfig(path=str(tmp_path / "list.csv")))


@pytest.mark.parametrize("names", [[], ["a"], "ab", [1, 2]])
def test_a_listing_whose_labels_have_no_names_is_refused(tmp_path: Path, names: Any) -> None:
    files = Listing.of(pa.array([b"1", b"2"], pa.large_binary()), pa.array([0, 1], pa.int32()), label_names=["a", "b"])
    batch = pa.ipc.open_file(files.buffer).read_all().replace_schema_metadata({"label_names": json.dumps(names)})
    path = tmp_path / "listing.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_table(batch)
    with pytest.raises(UsageError, match=r"listing\.arrow cannot be read \(its labels have no names\)"):
        Listing.open(path)
