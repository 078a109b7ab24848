"""Which files are images by their names, and what is said of the others."""

import logging
import os
import sys
from pathlib import Path

import pytest

from mgpu_ddp.config.schema import FolderConfig, ListConfig, WebDatasetConfig
from mgpu_ddp.data.datasets import find_listing
from mgpu_ddp.data.image_names import KINDS_SHOWN, MOST_KINDS, ImageNames, describe, most_common
from mgpu_ddp.data.listing import Listing
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import UsageError
from tests.support.sources import config_of, list_source, tar_of

MIXED = ("a.jpg", "b.JFIF", "c.jpe", "d.avif", "e.heic", "._a.jpg", "Thumbs.db", ".DS_Store", "x.jp2", "y.JP2", "photo")


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def listed(files: Listing) -> list[str]:
    return [os.fsdecode(files.path(i)) for i in range(len(files))]


def test_a_folder_says_what_it_leaves_out(tmp_path: Path, world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    root = tmp_path / "photos"
    touch(root, *MIXED)
    (root / "out.jpg").symlink_to(tmp_path)
    (root / "gone.jpg").symlink_to("nothing")
    os.mkfifo(root / "pipe.jpg")
    files = list_source(FolderConfig(root=str(root)), world)
    assert listed(files) == ["a.jpg", "b.JFIF", "c.jpe", "d.avif", "e.heic"]
    wanted = {
        "of the system": 3,
        ".jp2": 2,
        "without extension": 1,
        "links to nothing": 1,
        "no regular files": 1,
        "behind links out of data.root (data.follow_outside)": 1,
    }
    assert files.left_out == wanted
    assert [line for line in caplog.messages if "left out" in line] == [describe(wanted)]
    assert describe(wanted).startswith("9 files left out: 3 of the system, 2 .jp2, 1 behind links out of data.root")
    # Also where nothing is new.
    again = find_listing(config_of(FolderConfig(root=str(root))), files, world)
    assert again is not None
    assert again.left_out == wanted


def test_heic_is_left_out_with_the_line_that_says_what_to_install(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    touch(tmp_path, "a.jpg", "b.heic", "c.HEIC")
    files = list_source(FolderConfig(root=str(tmp_path)), world)
    assert listed(files) == ["a.jpg"]
    assert describe(files.left_out) == "2 files left out: 2 .heic; pip install 'mgpu-ddp[heic]' reads HEIC"
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(UsageError, match=r"holds no image \(jpg, .*\) \(2 files left out: 2 .heic; pip install"):
        list_source(FolderConfig(root=str(tmp_path)), world)
    # A list names it: it is a row of its own, and the error says the same.
    (tmp_path / "list.txt").write_text("b.heic\n")
    assert listed(list_source(ListConfig(path=str(tmp_path / "list.txt")), world)) == ["b.heic"]


def test_extensions_of_ones_own(tmp_path: Path, world: World) -> None:
    touch(tmp_path, *MIXED)
    files = list_source(FolderConfig(root=str(tmp_path), extensions=[".JP2", "", "jpg"]), world)
    assert listed(files) == ["a.jpg", "photo", "x.jp2", "y.JP2"]
    assert files.left_out == {"of the system": 3, ".jfif": 1, ".jpe": 1, ".avif": 1, ".heic": 1}
    (tmp_path / "list.csv").write_text("path,label\nx.jp2,1\na/b.jpg,2\nphoto,3\n")
    data = ListConfig(path=str(tmp_path / "list.csv"), extensions=["jpg"])
    files = list_source(data, world)
    assert [(files.path(i), files.label(i)) for i in range(len(files))] == [(b"a/b.jpg", 2)]
    assert files.left_out == {".jp2": 1, "without extension": 1}
    with pytest.raises(
        UsageError, match=r"data.extensions must be those of files in the list \(3 files left out: 1 .jp2"
    ):
        list_source(ListConfig(path=str(tmp_path / "list.csv"), extensions=["png"]), world)


def test_a_tar_counts_images_that_it_cannot_give_and_not_what_lies_beside_them(tmp_path: Path, world: World) -> None:
    members = dict.fromkeys(("a.jpg", "a.cls", "a.json", "b.jp2", "._a.jpg", "d/.DS_Store"), b"1")
    for number in range(2):
        tar_of(tmp_path / f"{number}.tar", members)
    data = WebDatasetConfig(urls=f"{tmp_path}/*.tar", label_extension="cls")
    files = list_source(data, world)
    assert listed(files) == ["0.tar/a.jpg", "1.tar/a.jpg"]
    assert files.left_out == {"of the system": 4, ".jp2": 2}
    (tmp_path / "listing.arrow").write_bytes(files.buffer)
    kept = find_listing(config_of(data), Listing.open(tmp_path / "listing.arrow"), world)
    assert kept is not None
    assert kept.left_out == files.left_out


def test_hostile_names_make_a_bounded_line() -> None:
    names = ImageNames()
    for number in range(1000):
        assert not names.take(b"x.%d" % number)
    for odd in (b"x.\xff\n", b"x." + b"y" * 300, b"x.<b>", b".", b"..", b"x."):
        assert not names.take(odd)
    counted = most_common(names.left_out)
    assert len(counted) <= MOST_KINDS + 1
    assert sum(counted.values()) == 1006
    line = describe(counted)
    assert line.isprintable()
    assert line.count(",") <= KINDS_SHOWN + 1
    assert len(line) < 400
