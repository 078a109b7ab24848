"""Archives: each byte is read once, what has not changed is not indexed again, and what changes ends the job."""

import os
from pathlib import Path

import pytest

from mgpu_ddp.config.schema import ListConfig, WebDatasetConfig
from mgpu_ddp.data.archives import ArchiveIndex, index_archives
from mgpu_ddp.data.list_file import read_list
from mgpu_ddp.data.listing import FILE_NAME, Listing
from mgpu_ddp.data.tar import TarSamples, index_tar
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import StateError
from tests.support.loading import load_all
from tests.support.samples import encoded, photo
from tests.support.sources import index_tars, parquet_of, parquet_samples, tar_of

JPEG = encoded(photo(20, 20), "JPEG")


def test_only_what_has_changed_is_indexed_again(tmp_path: Path, world: World) -> None:
    for number in range(4):
        tar_of(tmp_path / f"{number}.tar", {f"{number}.jpg": bytes([number]) * 9, f"{number}b.jpg": b"b"})
    seen: list[str] = []

    def index(path: str, name: str) -> ArchiveIndex:
        seen.append(name)
        return index_tar(WebDatasetConfig(urls="x"), path, name)

    def again(known: Listing | None) -> Listing:
        seen.clear()
        files = index_archives(f"{tmp_path}/*.tar", index, known, world, check="name")
        assert files is not None
        return files

    first = again(None)
    assert seen == ["0.tar", "1.tar", "2.tar", "3.tar"]
    (tmp_path / FILE_NAME).write_bytes(first.buffer)
    known = Listing.open(tmp_path / FILE_NAME)
    assert b"shards" in known.table.schema.metadata, "the key by which folders of earlier versions have it"
    assert again(known) is known
    assert seen == []
    tar_of(tmp_path / "1.tar", {"new.txt": b"", "1.jpg": b"one", "1b.jpg": b"b"})
    tar_of(tmp_path / "4.tar", {"4.jpg": b"four"})
    grown = again(known)
    assert seen == ["1.tar", "4.tar"]
    assert grown.refreshed
    assert grown.digest(len(known)) == known.digest(len(known)), "the same names in the same order: the same job"
    assert [TarSamples(grown).fetch(i) for i in (0, 2, 4, 8)] == [bytes(9), b"one", bytes([2]) * 9, b"four"]


@pytest.mark.parametrize("change", ["rewritten", "touched", "gone"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_archive_that_changes_while_it_is_read_ends_the_job_in_one_line(
    tmp_path: Path, world: World, change: str, workers: int
) -> None:
    for number in range(2):
        tar_of(tmp_path / f"{number}.tar", {f"{i}.jpg": JPEG for i in range(8)})
    samples = TarSamples(index_tars(tmp_path / "{0,1}.tar", world))
    path = tmp_path / "1.tar"
    if change == "rewritten":
        tar_of(path, {"0.jpg": b""})
    elif change == "touched":
        os.utime(path)
    else:
        path.unlink()
    with pytest.raises(StateError, match=r"1\.tar' has changed since it was indexed \(") as raised:
        load_all(samples, world, workers=workers)
    assert "\n" not in str(raised.value)


def large(i: int) -> bytes:
    """A real image with so many bytes after its end that reading dominates."""
    return JPEG + os.urandom(60_000 + i)


@pytest.mark.parametrize("size", [1, 2])
def test_what_is_read_is_at_most_a_tenth_more_than_the_data(tmp_path: Path, world: World, size: int) -> None:
    images = [large(i) for i in range(192)]
    for number in range(2):
        mine = images[number * 96 : (number + 1) * 96]
        tar_of(tmp_path / f"{number}.tar", {f"{i}.jpg": image for i, image in enumerate(mine)})
        parquet_of(tmp_path / f"{number}.parquet", 12, image=mine)
    data = sum(map(len, images))
    for samples in (
        TarSamples(index_tars(tmp_path / "*.tar", world)),
        parquet_samples(tmp_path / "*.parquet", world),
    ):
        found = load_all(samples, world, size=size, block=24)
        assert sorted(found.index) == list(range(192))
        assert found.errors == {}
        assert 0.9 < found.read_bytes / data <= 1.1, type(samples).__name__


def test_files_need_no_utf8_names(tmp_path: Path, world: World) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    folder.mkdir()
    tar_of(folder / "x\udcfe.tar", {"a.jpg": b"1"})
    parquet_of(tmp_path / "x.parquet", image=[b"2"]).rename(folder / "x\udcfe.parquet")
    (folder / "x\udcfe.txt").write_bytes(b"a\xfd.jpg\n")
    tars, columns = TarSamples(index_tars(folder / "*.tar", world)), parquet_samples(folder / "*.parquet", world)
    assert [(s.path(0), s.fetch(0)) for s in (tars, columns)] == [
        ("x\\udcfe.tar/a.jpg", b"1"),
        ("x\\udcfe.parquet/0", b"2"),
    ]
    assert read_list(ListConfig(path=str(folder / "x\udcfe.txt"))).path(0) == b"a\xfd.jpg"
