"""Folders → the sorted listing that alone defines which index is which image."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mgpu_ddp.data.files import find_images
from mgpu_ddp.data.image_names import EXTENSIONS
from mgpu_ddp.data.listing import Listing, class_labels, readable
from mgpu_ddp.errors import UsageError


def touch(root: Path, *names: str | bytes) -> None:
    for name in names:
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb"):
            pass


def names(root: Path, *, follow_outside: bool = False) -> list[str]:
    return [os.fsdecode(path) for path in find_images(str(root), follow_outside=follow_outside).paths]


def test_every_extension_in_any_case_counts_and_nothing_else(tmp_path: Path) -> None:
    kinds = [f".{extension}" for extension in EXTENSIONS]
    assert kinds == [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".avif"]
    kinds += [".heic", ".heif", ".hif"]
    wanted = [f"{n}{kind}" for n, lower in enumerate(kinds) for kind in (lower, lower.upper(), lower.title())]
    touch(tmp_path, *wanted, "notes.txt", "jpg", "image.jpg.bak", "image.svg", "a.jpgx")
    (tmp_path / "folder.jpg").mkdir()
    assert names(tmp_path) == sorted(wanted)


def test_recursive_and_sorted_by_bytes_of_the_whole_path(tmp_path: Path) -> None:
    # "a-b" sorts before "a/z" by bytes, though a folder walk would see "a" first; capitals precede small letters.
    wanted = ["B.png", "a-b.png", "a.png", "a/b/c/d.png", "a/z.png", "b.png", "é.png"]
    touch(tmp_path, *reversed(wanted))
    assert names(tmp_path) == wanted == sorted(wanted, key=os.fsencode)


def test_any_name_survives_the_round_trip(tmp_path: Path) -> None:
    odd = [b"line\nbreak.png", b"nul-free \xff\xfe.png", b"quote'\".png", "snow ☃.png".encode(), b" .png", b"-.png"]
    root = tmp_path / "images"
    touch(root, *odd)
    found = find_images(str(root)).paths
    assert found == sorted(odd)
    built = Listing.build(found)
    (tmp_path / "listing.arrow").write_bytes(built.buffer)
    opened = Listing.open(tmp_path / "listing.arrow")
    assert len(opened) == len(odd)
    assert [opened.path(i) for i in range(len(opened))] == found
    assert {opened.label(i) for i in range(len(opened))} == {-1}
    assert opened.digest(6) == built.digest(6)


def test_names_of_many_are_those_of_each() -> None:
    text = [b"a.png", "snow ☃\n\\.png".encode(), b"", "😀.png".encode()]
    # Not UTF-8: a lone byte, half a character, a surrogate, a number past the last character.
    for odd in ([], [b"\xff.png"], [b"\xe9t.png"], [b"\xed\xa0\x80.png"], [b"\xf4\x90\x80\x80.png"]):
        built = Listing.build([*text, *odd])
        order = np.array([3, 0, 0, len(text) + len(odd) - 1])
        named = built.names(order)
        assert str(named.type) == "string"
        assert named.to_pylist() == [readable(built.path(int(i))) for i in order]
    assert built.names(np.arange(0)).to_pylist() == []


def test_digest_is_stable_and_sees_every_path() -> None:
    listings = [[b"a/1.png", b"a/2.png"], [b"a/1.png", b"a/3.png"], [b"a/1.png"], [b"a/1.pnga", b"/2.png"], []]
    digests = [Listing.build(paths).digest(len(paths)) for paths in listings]
    assert len(set(digests)) == len(listings)
    assert Listing.build(listings[0]).digest(2) == digests[0]
    assert Listing.build([*listings[0], b"b/1.png"]).digest(2) == digests[0], "what comes later does not count"


def test_a_grown_listing_keeps_every_index_and_label() -> None:
    first = Listing.build([b"cat/2.png", b"dog/1.png"])
    assert first.grown([b"cat/2.png"]) is first
    grown = first.grown([b"ant/1.png", b"cat/1.png", b"cat/2.png", b"top.png"])
    found = [(grown.path(i), grown.label(i)) for i in range(len(grown))]
    assert found == [(b"cat/2.png", 0), (b"dog/1.png", 1), (b"ant/1.png", 2), (b"cat/1.png", 0), (b"top.png", -1)]
    again = grown.grown([b"eel/1.png", b"ant/2.png"])
    assert [again.label(i) for i in range(5, 7)] == [3, 2]
    assert again.digest(2) == first.digest(2)
    without = Listing.build([b"1.png"]).grown([b"cat/1.png"])
    assert without.label(1) == -1


@pytest.mark.parametrize("kept", [0, 1, 7, 100, -9, -1])
def test_a_damaged_listing_is_refused_in_one_line(tmp_path: Path, kept: int) -> None:
    data = bytes(Listing.build([b"a/1.png", b"a/2.png"]).buffer)
    (tmp_path / "listing.arrow").write_bytes(data[:kept])
    with pytest.raises(UsageError, match=r"listing\.arrow cannot be read \(") as raised:
        Listing.open(tmp_path / "listing.arrow")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", ["an offset", "numbers", "text", "two batches", "no rows"])
def test_a_listing_of_another_shape_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    """Arrow itself reads a path outside of its buffer without a word, which may end the process."""
    path = tmp_path / "listing.arrow"
    good = Listing.build([b"a/1.jpg", b"a/2.jpg", b"b/333.jpg"])
    offset, far = (number.to_bytes(8, "little") for number in (14, 1 << 40))
    path.write_bytes(bytes(good.buffer).replace(offset, far))
    if damage != "an offset":
        names = {"numbers": pa.array([1, 2]), "text": pa.array(["a", "b"])}
        batch = pa.record_batch(
            {
                "path": names.get(damage, pa.array([b"a", b"b"], pa.large_binary())),
                "label": pa.array([0, 1], pa.int32()),
            }
        )
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            for _ in range({"two batches": 2, "no rows": 0}.get(damage, 1)):
                writer.write_batch(batch)
    with pytest.raises(
        UsageError, match=r"listing\.arrow cannot be read \(.*\): it is the listing this job began with"
    ):
        Listing.open(path)


@pytest.mark.parametrize(
    ("paths", "labels", "classes"),
    [
        ([b"cat/1.png", b"cat/2.png", b"dog/1.png"], [0, 0, 1], ["cat", "dog"]),
        ([b"a\xff/1.png", b"b/1.png"], [0, 1], [r"a\udcff", "b"]),
        ([b"only/1.png"], [0], ["only"]),
        ([b"cat/1.png", b"top.png"], None, []),
        ([b"cat/1.png", b"dog/deep/1.png"], None, []),
        ([b"top.png"], None, []),
        ([], None, []),
    ],
)
def test_class_folders_give_labels_only_where_all_sit_in_one_level(
    paths: list[bytes], labels: list[int] | None, classes: list[str]
) -> None:
    assert class_labels(paths) == (labels, classes)
    if paths:
        listed = Listing.build(paths)
        assert [listed.label(i) for i in range(len(paths))] == (labels or [-1] * len(paths))


def test_linked_folders_are_followed_once_and_the_real_name_wins(tmp_path: Path) -> None:
    touch(tmp_path, "m/1.png", "m/deep/2.png")
    for link in ("a", "z", "m/deep/self"):
        (tmp_path / link).symlink_to(tmp_path / "m", target_is_directory=True)
    (tmp_path / "b").symlink_to("m/deep", target_is_directory=True)
    (tmp_path / "m/deep/up").symlink_to("../..", target_is_directory=True)
    assert names(tmp_path) == ["m/1.png", "m/deep/2.png"]


def test_links_out_of_the_root_are_skipped_unless_asked_for(tmp_path: Path) -> None:
    touch(tmp_path, "outside/1.png", "outside/deep/2.png", "root/0.png", "root2/3.png")
    root = tmp_path / "root"
    (root / "folder").symlink_to(tmp_path / "outside", target_is_directory=True)
    (root / "again").symlink_to("../outside", target_is_directory=True)
    (root / "file.png").symlink_to("../outside/1.png")
    (root / "sibling.png").symlink_to("../root2/3.png")  # its path begins with the root's, as text
    (root / "inside.png").symlink_to("0.png")
    assert names(root) == ["0.png", "inside.png"]
    followed = ["0.png", "again/1.png", "again/deep/2.png", "file.png", "inside.png", "sibling.png"]
    assert names(root, follow_outside=True) == followed


def test_a_root_that_is_itself_a_link_is_no_way_out(tmp_path: Path) -> None:
    touch(tmp_path, "real/a.png")
    (tmp_path / "real/b.png").symlink_to("a.png")
    (tmp_path / "link").symlink_to("real", target_is_directory=True)
    assert names(tmp_path / "link") == ["a.png", "b.png"]


def test_dangling_links_loops_and_fifos_are_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    (tmp_path / "dangling.png").symlink_to("nothing.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "to-pipe.png").symlink_to("pipe.png")
    assert names(tmp_path, follow_outside=True) == ["a.png"]


@pytest.mark.parametrize("root", ["missing", "file.png", "dangling"])
def test_a_root_that_cannot_be_read_is_the_users_mistake(tmp_path: Path, root: str) -> None:
    touch(tmp_path, "file.png")
    (tmp_path / "dangling").symlink_to("nothing")
    with pytest.raises(UsageError, match=r"data\.root must be a readable folder, got '.*" + root) as raised:
        names(tmp_path / root)
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_an_unreadable_folder_is_not_left_out_in_silence(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "closed/b.png")
    (tmp_path / "closed").chmod(0)
    try:
        with pytest.raises(UsageError, match=r"data\.root .*closed.*Permission denied"):
            names(tmp_path)
    finally:
        (tmp_path / "closed").chmod(0o755)


def test_readable_keeps_text_and_escapes_what_is_not_utf8() -> None:
    assert readable("snow ☃\n\\.png".encode()) == "snow ☃\n\\.png"
    assert readable(b"\xff\xe9t\xc3\xa9.png") == r"\udcff\udce9té.png"
    readable(bytes(range(1, 256))).encode("utf-8")
