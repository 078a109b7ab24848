"""Tars and Parquet: what they hold is found and read, each byte once, and what is broken is one line."""

import os
import subprocess
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mgpu_ddp import merge
from mgpu_ddp.config.schema import (
    Config,
    ListConfig,
    LoaderConfig,
    ModelConfig,
    ParquetConfig,
    TransformConfig,
    WebDatasetConfig,
)
from mgpu_ddp.data import parquet, row_group_cache
from mgpu_ddp.data.archives import ArchiveIndex, index_archives
from mgpu_ddp.data.datasets import find_listing
from mgpu_ddp.data.encoded import EncodedSamples
from mgpu_ddp.data.list_file import read_list
from mgpu_ddp.data.listing import FILE_NAME, Listing
from mgpu_ddp.data.parquet import ParquetSamples, index_parquet
from mgpu_ddp.data.patterns import expand, root_of
from mgpu_ddp.data.tar import TarSamples, index_tar
from mgpu_ddp.distributed.sharding import Plan, ShardSampler
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import StateError, UsageError
from mgpu_ddp.loader.batch import Batch
from mgpu_ddp.loader.loader import load_batches
from mgpu_ddp.output.manifest import Manifest
from tests.support.choices import resolved
from tests.support.samples import encoded, photo
from tests.support.sources import member

JPEG = encoded(photo(20, 20), "JPEG")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("/x/a.tar", ["/x/a.tar"]),
        ("/x/{08..11}.tar", ["/x/08.tar", "/x/09.tar", "/x/10.tar", "/x/11.tar"]),
        ("/x/{2..0}", ["/x/2", "/x/1", "/x/0"]),
        ("/x/{a,b}/{1..2}.tar", ["/x/a/1.tar", "/x/a/2.tar", "/x/b/1.tar", "/x/b/2.tar"]),
        ("/x/{literal}.tar", ["/x/{literal}.tar"]),
        ("/x/{,s}", ["/x/", "/x/s"]),
    ],
)
def test_braces_are_those_of_shells(pattern: str, names: list[str]) -> None:
    assert expand(pattern) == names


def test_stars_find_files_in_order(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "c.txt", "[1].tar"):
        (tmp_path / name).touch()
    assert expand(f"{tmp_path}/?.tar") == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]
    assert expand(f"{tmp_path}/[1].tar") == [f"{tmp_path}/[1].tar"], "a file of that very name"
    assert root_of(f"{tmp_path}/x/{{a,b}}/*.tar") == f"{tmp_path}/x"
    for pattern in (f"{tmp_path}/*.gone", "{0..99999999999}", "{0..999}{0..999}{0..9}", "{a,{b,c}}"):
        with pytest.raises(UsageError, match=r"^data\.urls"):
            expand(pattern)


def tar_of(path: Path, members: dict[str, bytes], **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items():
            member(tar, name, content)
    return path


def indexed(path: Path, world: World, **settings: Any) -> Listing:
    data = WebDatasetConfig(urls=str(path), **settings)
    config = Config(data=data, transform=TransformConfig(), model=ModelConfig())
    files = find_listing(config, None, world)
    assert files is not None
    return files


def rows(files: Listing) -> list[tuple[bytes, int]]:
    return [(files.path(i), files.label(i)) for i in range(len(files))]


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
    files = indexed(path, world)
    names = [name for name in SAMPLES if name.lower().endswith(("jpg", "png"))]
    assert [name for name, _ in rows(files)] == [f"x.tar/{name}".encode() for name in names]
    samples = TarSamples(files)
    assert [samples.fetch(i) for i in range(len(samples))] == [SAMPLES[name] for name in names]
    left = indexed(path, world, extensions=["left.jpg"], label_extension="cls")
    assert rows(left) == [(b"x.tar/s/0.left.jpg", 7), (b"x.tar/s/1.left.jpg", -1)]
    assert rows(indexed(path, world, label_extension=".CLS"))[-2:] == [
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
    files = indexed(tmp_path / "x.tar", world)
    wanted = [os.fsencode(long), b"caf\xe9.jpg", b"new\nline.jpg"]
    assert [name for name, _ in rows(files)] == [b"x.tar/" + name for name in wanted]
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
    files = indexed(tmp_path / "x.tar", world)
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
        indexed(tmp_path / "x.tar", world, label_extension="cls")


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
    files = indexed(tmp_path / "x.tar", world, label_extension="cls")
    assert rows(files) == [
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
        indexed(joined, world)
    # What GNU tar itself does: its own way to join, an appended member, and large records of padding.
    joined.write_bytes(first.read_bytes())
    subprocess.run(["tar", "--concatenate", "-f", joined, second], check=True)
    (tmp_path / "c.jpg").write_bytes(JPEG)
    subprocess.run(["tar", "-rf", joined, "-C", tmp_path, "c.jpg"], check=True)
    joined.write_bytes(joined.read_bytes() + bytes(3 << 20))
    assert [name for name, _ in rows(indexed(joined, world))] == [b"ab.tar/a.jpg", b"ab.tar/b.jpg", b"ab.tar/c.jpg"]


def compressed(data: bytes) -> bytes:
    import gzip

    return gzip.compress(data)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda data: data[:600], "byte"),
        (lambda data: data[:1024], "broken at byte 1,024 (it was cut off)"),
        (lambda data: data[:700] + b"", "byte"),
        (lambda data: data[:1024] + b"garbage!" * 64 + data[1536:], "broken at byte 1,024 (no header)"),
        (lambda data: data[:1024] + data[1024:1100], "broken at byte 1,024 (it was cut off)"),
        (lambda _data: b"", "empty"),
        (lambda _data: b"no tar at all", "truncated"),
        (compressed, "is compressed, so it has no random access. Unpack it."),
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
        indexed(tmp_path / "{0..2}.tar", world)
    assert f"{broken}" in str(raised.value)
    assert said in str(raised.value)
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
        indexed(tmp_path / "x.tar", world, **settings)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_only_what_has_changed_is_indexed_again(tmp_path: Path, world: World) -> None:
    for number in range(4):
        tar_of(tmp_path / f"{number}.tar", {f"{number}.jpg": bytes([number]) * 9, f"{number}b.jpg": b"b"})
    seen: list[str] = []

    def index(path: str, name: str) -> ArchiveIndex:
        seen.append(name)
        return index_tar(WebDatasetConfig(urls="x"), path, name)

    def again(known: Listing | None) -> Listing:
        seen.clear()
        files = index_archives(f"{tmp_path}/*.tar", index, known, world)
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


def test_shards_of_a_job_may_have_seen_their_tars_touched(tmp_path: Path, world: World) -> None:
    tar_of(tmp_path / "x.tar", {"a.jpg": b"1", "b.jpg": b"2"})
    identities = []
    for number, content in enumerate((b"1", b"1", b"one")):
        folder = tmp_path / str(number)
        folder.mkdir()
        tar_of(tmp_path / "x.tar", {"a.jpg": content, f"{'c' if number == 2 else 'b'}.jpg": b"2"})
        os.utime(tmp_path / "x.tar", ns=(number, number))
        (folder / FILE_NAME).write_bytes(indexed(tmp_path / "x.tar", world).buffer)
        manifest = Manifest(fingerprint={}, start=0, stop=2, batch_size=1)
        identities.append(merge._identity(merge.Shard(folder=folder, manifest=manifest, number=number, count=3)))
    assert identities[0] == identities[1] != identities[2]


def batches(samples: EncodedSamples, world: World, *, workers: int = 2, size: int = 1, block: int = 1) -> list[Batch]:
    """All batches of all ranks, copied."""
    plan = Plan(
        start=0,
        stop=len(samples),
        size=size,
        batch_size=4,
        contiguous=False,
        smallest_rows=16,
        largest_rows=16,
        block=block,
    )
    found = []
    for rank in range(size):
        choices = resolved(workers=workers)
        with load_batches(samples, ShardSampler(plan, rank), LoaderConfig(), choices, world, held=1) as loaded:
            found += [batch for batch, _ in loaded]
    return found


@pytest.mark.parametrize("change", ["rewritten", "touched", "gone"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_archive_that_changes_while_it_is_read_ends_the_job_in_one_line(
    tmp_path: Path, world: World, change: str, workers: int
) -> None:
    for number in range(2):
        tar_of(tmp_path / f"{number}.tar", {f"{i}.jpg": JPEG for i in range(8)})
    samples = TarSamples(indexed(tmp_path / "{0,1}.tar", world))
    path = tmp_path / "1.tar"
    if change == "rewritten":
        tar_of(path, {"0.jpg": b""})
    elif change == "touched":
        os.utime(path)
    else:
        path.unlink()
    with pytest.raises(StateError, match=r"1\.tar' has changed since it was indexed \(") as raised:
        batches(samples, world, workers=workers)
    assert "\n" not in str(raised.value)


def parquet_of(path: Path, group: int = 3, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def parquet_samples(path: Path, world: World, **settings: Any) -> ParquetSamples:
    data = ParquetConfig(urls=str(path), **settings)
    files = index_archives(data.urls, partial(index_parquet, data), None, world)
    assert files is not None
    return ParquetSamples(files, data.column)


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
        ({"label_column": "word"}, "holds string, not whole numbers"),
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
    found = batches(parquet_samples(path, world), world)
    errors = {index: reason for batch in found for index, reason in batch.errors.items()}
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
        TarSamples(indexed(tmp_path / "*.tar", world)),
        parquet_samples(tmp_path / "*.parquet", world),
    ):
        found = batches(samples, world, workers=2, size=size, block=24)
        assert sorted(i for batch in found for i in batch.index.tolist()) == list(range(192))
        assert all(not batch.errors for batch in found)
        read = sum(batch.read_bytes for batch in found)
        assert 0.9 < read / data <= 1.1, type(samples).__name__


def test_files_need_no_utf8_names(tmp_path: Path, world: World) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    folder.mkdir()
    tar_of(folder / "x\udcfe.tar", {"a.jpg": b"1"})
    parquet_of(tmp_path / "x.parquet", image=[b"2"]).rename(folder / "x\udcfe.parquet")
    (folder / "x\udcfe.txt").write_bytes(b"a\xfd.jpg\n")
    tars, columns = TarSamples(indexed(folder / "*.tar", world)), parquet_samples(folder / "*.parquet", world)
    assert [(s.path(0), s.fetch(0)) for s in (tars, columns)] == [
        ("x\\udcfe.tar/a.jpg", b"1"),
        ("x\\udcfe.parquet/0", b"2"),
    ]
    assert read_list(ListConfig(path=str(folder / "x\udcfe.txt"))).path(0) == b"a\xfd.jpg"
