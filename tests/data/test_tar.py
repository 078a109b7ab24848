"""Tars: every image is found and read, whatever wrote the tar, and what is broken is one line."""

import gzip
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mgpu_ddp.data.tar import TarSamples
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import UsageError
from tests.support.samples import encoded, photo
from tests.support.sources import index_tars, labelled_paths, member, tar_of

JPEG = encoded(photo(20, 20), "JPEG")

SAMPLES = {
    "s/0.cls": b"7",
    "s/0.left.jpg": b"left",
    "s/0.right.JPG": b"right",
    "s/0.txt": b"words",
    "s/1.json": b"{",
    "s/1.left.jpg": b"another left",
    "s/1.pth": b"never looked into",
    "s/2.right.jpg": b"",
    "s/2.cls": b" 3\n",
    "t/2.png": b"other folder, other sample",
    "noextension": b"x",
}


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_images_of_a_tar_are_found_by_their_extensions(tmp_path: Path, world: World, kind: int) -> None:
    path = tar_of(tmp_path / "x.tar", SAMPLES, format=kind)
    files = index_tars(path, world)
    names = [name for name in SAMPLES if name.lower().endswith(("jpg", "png"))]
    assert [name for name, _ in labelled_paths(files)] == [f"x.tar/{name}".encode() for name in names]
    samples = TarSamples(files)
    assert [samples.fetch(i) for i in range(len(samples))] == [SAMPLES[name] for name in names]
    left = index_tars(path, world, extensions=["left.jpg"], label_extension="cls")
    assert labelled_paths(left) == [(b"x.tar/s/0.left.jpg", 7), (b"x.tar/s/1.left.jpg", -1)]
    assert labelled_paths(index_tars(path, world, label_extension=".CLS"))[-2:] == [
        (b"x.tar/s/2.right.jpg", 3),
        (b"x.tar/t/2.png", -1),
    ]


def test_odd_members_are_left_out_and_odd_names_kept(tmp_path: Path, world: World) -> None:
    long = "d" * 120 + "/" + "n" * 150 + ".jpg"
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar:
        for name in (long, "caf\udce9.jpg", "new\nline.jpg"):
            member(tar, name, b"x" + os.fsencode(name))
        for kind, name in ((tarfile.DIRTYPE, "dir.jpg"), (tarfile.FIFOTYPE, "p.jpg"), (tarfile.CHRTYPE, "c.jpg")):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
    files = index_tars(tmp_path / "x.tar", world)
    wanted = [os.fsencode(long), b"caf\xe9.jpg", b"new\nline.jpg"]
    assert [name for name, _ in labelled_paths(files)] == [b"x.tar/" + name for name in wanted]
    assert [TarSamples(files).fetch(i) for i in range(3)] == [b"x" + name for name in wanted]


def test_links_are_the_images_they_stand_for_and_others_are_error_rows(tmp_path: Path, world: World) -> None:
    """As GNU tar writes them, from real links and a real sparse file."""
    folder = tmp_path / "photos"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "1.jpg").write_bytes(JPEG)
    os.link(folder / "a" / "1.jpg", folder / "a" / "2.jpg")
    (folder / "a" / "3.jpg").symlink_to("1.jpg")
    (folder / "b").symlink_to("a")
    (folder / "4.jpg").symlink_to("a/../a/1.jpg")
    (folder / "5.jpg").symlink_to("/etc/passwd")
    (folder / "6.jpg").symlink_to("gone.jpg")
    with (folder / "7.jpg").open("wb") as sparse:
        sparse.truncate(1 << 20)
        sparse.seek(1 << 19)
        sparse.write(JPEG)
    (folder / "1.cls").symlink_to("a/1.jpg")
    subprocess.run(["tar", "-S", "--sort=name", "-cf", tmp_path / "x.tar", "-C", folder, "."], check=True)
    files = index_tars(tmp_path / "x.tar", world)
    places = {files.path(i).rpartition(b"/")[2].decode(): i for i in range(len(files))}
    assert len(places) == len(files) == 7
    samples = TarSamples(files)
    assert {samples.fetch(places[f"{name}.jpg"]) for name in (1, 2, 3, 4)} == {JPEG}
    for name in (5, 6, 7):
        with pytest.raises(ValueError, match="a sparse file, or a link to no image of this tar"):
            samples.fetch(places[f"{name}.jpg"])
        with pytest.raises(ValueError, match="a sparse file, or a link to no image of this tar"):
            samples._request(places[f"{name}.jpg"]).result()
    with pytest.raises(UsageError, match=r"'\./1\.cls' in '.*x\.tar' holds b'', not a whole number"):
        index_tars(tmp_path / "x.tar", world, label_extension="cls")


def test_a_hard_link_means_the_member_before_it(tmp_path: Path, world: World) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in {"x.jpg": b"old", "x.cls": b"3", "blob": b"plain"}.items():
            member(tar, name, content)
        for name, target in {"y.jpg": "x.jpg", "y.cls": "x.cls", "z.jpg": "blob", "w.jpg": "later.jpg"}.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, target
            tar.addfile(info)
        member(tar, "x.jpg", b"new")
        member(tar, "later.jpg", b"later")
    files = index_tars(tmp_path / "x.tar", world, label_extension="cls")
    assert labelled_paths(files) == [
        *((b"x.tar/x.jpg", 3), (b"x.tar/y.jpg", 3), (b"x.tar/z.jpg", -1)),
        *((b"x.tar/w.jpg", -1), (b"x.tar/x.jpg", -1), (b"x.tar/later.jpg", -1)),
    ]
    samples = TarSamples(files)
    assert [samples.fetch(i) for i in (0, 1, 2, 4, 5)] == [b"old", b"old", b"plain", b"new", b"later"]
    with pytest.raises(ValueError, match="a link to no image of this tar"):
        samples.fetch(3)


def test_what_follows_the_end_of_a_tar_is_not_lost_in_silence(tmp_path: Path, world: World) -> None:
    first, second = (tar_of(tmp_path / f"{n}.tar", {f"{n}.jpg": JPEG}) for n in "ab")
    joined = tmp_path / "ab.tar"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(UsageError, match=r"something follows the end of the tar '.*ab\.tar' at byte 1,536"):
        index_tars(joined, world)
    # What GNU tar itself does: its own way to join, an appended member, and large records of padding.
    joined.write_bytes(first.read_bytes())
    subprocess.run(["tar", "--concatenate", "-f", joined, second], check=True)
    (tmp_path / "c.jpg").write_bytes(JPEG)
    subprocess.run(["tar", "-rf", joined, "-C", tmp_path, "c.jpg"], check=True)
    joined.write_bytes(joined.read_bytes() + bytes(3 << 20))
    assert [name for name, _ in labelled_paths(index_tars(joined, world))] == [
        b"ab.tar/a.jpg",
        b"ab.tar/b.jpg",
        b"ab.tar/c.jpg",
    ]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda data: data[:600], "byte"),
        (lambda data: data[:1024], "broken at byte 1,024 (it was cut off)"),
        (lambda data: data[:1024] + b"garbage!" * 64 + data[1536:], "broken at byte 1,024 (no header)"),
        (lambda data: data[:1024] + data[1024:1100], "broken at byte 1,024 (it was cut off)"),
        (lambda _data: b"", "empty"),
        (lambda _data: b"no tar at all", "truncated"),
        (gzip.compress, "is compressed, so it has no random access. Unpack it."),
    ],
)
def test_a_broken_tar_among_others_is_named_in_one_line(
    tmp_path: Path, world: World, spoil: Callable[[bytes], bytes], said: str
) -> None:
    for number in range(3):
        tar_of(tmp_path / f"{number}.tar", {"a.jpg": b"1", "b.jpg": b"2"})
    broken = tmp_path / "1.tar"
    broken.write_bytes(spoil(broken.read_bytes()))
    with pytest.raises(UsageError) as raised:
        index_tars(tmp_path / "{0..2}.tar", world)
    assert f"{broken}" in str(raised.value)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.timeout(20)
def test_holes_take_no_time(tmp_path: Path, world: World) -> None:
    path = tar_of(tmp_path / "x.tar", {"a.jpg": b"1"})
    os.truncate(path, 20 << 30)
    assert labelled_paths(index_tars(path, world)) == [(b"x.tar/a.jpg", -1)]
    with path.open("r+b") as file:
        file.seek(19 << 30)
        file.write(JPEG)
    with pytest.raises(UsageError, match="something follows the end of the tar"):
        index_tars(path, world)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
@pytest.mark.parametrize("first", [True, False])
def test_a_header_of_gigabytes_is_refused_in_one_line(tmp_path: Path, world: World, kind: bytes, first: bool) -> None:
    header = tarfile.TarInfo("a")
    header.type, header.size = kind, 19 << 30
    path = tar_of(tmp_path / "x.tar", {"a.jpg": b"1"})
    before = b"" if first else path.read_bytes()[:1024]
    path.write_bytes(before + header.tobuf(tarfile.GNU_FORMAT))
    os.truncate(path, 20 << 30)
    with pytest.raises(UsageError, match=r"x\.tar' .*a header of 20401094656 bytes") as raised:
        index_tars(path, world)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("members", "settings", "said"),
    [
        ({"a.txt": b""}, {}, "none of the files holds an image"),
        ({"a.jpg": b"", "a.cls": b"cat"}, {"label_extension": "cls"}, "'a.cls' in "),
        ({"a.jpg": b"", "a.cls": b"1" * 40}, {"label_extension": "cls"}, "data.label_extension"),
        ({"a.jpg": b"", "b.cls": b"1"}, {"label_extension": "cls"}, "right before or after its images, got 'cls'"),
        (None, {}, "cannot be read (No such file or directory)"),
    ],
)
def test_what_a_tar_lacks_is_said_in_one_line(
    tmp_path: Path, world: World, members: Any, settings: dict[str, Any], said: str
) -> None:
    if members is not None:
        tar_of(tmp_path / "x.tar", members)
    with pytest.raises(UsageError) as raised:
        index_tars(tmp_path / "x.tar", world, **settings)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
