"""Images behind URLs: a real server of S3's protocol, and a network that fails in the ways networks do."""

import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mgpu_ddp.config.schema import (
    FolderConfig,
    ListConfig,
    ParquetConfig,
    WebDatasetConfig,
)
from mgpu_ddp.data import object_store, retry
from mgpu_ddp.data.datasets import open_samples
from mgpu_ddp.data.files import FileSamples
from mgpu_ddp.data.list_file import read_list
from mgpu_ddp.data.listing import Listing
from mgpu_ddp.data.read_ahead import ReadAhead
from mgpu_ddp.data.samples import ChosenSamples, Samples
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import StateError, UsageError
from tests.support import s3
from tests.support.loading import load_all
from tests.support.runs import make_images
from tests.support.sources import config_of, list_source, open_source, sources

COUNT = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bucket: images, and the same in archives."""
    bucket = tmp_path_factory.mktemp("served") / "bucket"
    images = make_images(bucket / "photos", COUNT)
    sources(bucket, images, [index % 3 for index in range(COUNT)])
    (bucket / "list.txt").write_text("".join(f"s3://bucket/{path.relative_to(bucket)}\n" for path in images))
    return bucket


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with s3.served(folder.parent, tmp_path_factory.mktemp("log") / "log") as port:
        yield port


@pytest.fixture
def proxy(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Proxy]:
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.001)
    with s3.proxied(server) as proxy:
        s3.use(monkeypatch, proxy.port)
        yield proxy


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder / "photos")) for path in (folder / "photos").rglob("*.*"))


def test_what_is_listed_is_what_is_there(proxy: s3.Proxy, folder: Path) -> None:
    assert sorted(object_store.find("s3://bucket/photos")) == names(folder)
    assert object_store.glob("s3://bucket/shard-*.tar") == [f"s3://bucket/shard-0{number}.tar" for number in range(3)]
    assert object_store.find("s3://bucket/nothing/here") == []
    tar = folder / "shard-00.tar"
    before = object_store.size_and_version("s3://bucket/shard-00.tar")
    assert before[0] == tar.stat().st_size
    content = tar.read_bytes()
    try:
        tar.write_bytes(content[:-1] + b"x")
        assert object_store.size_and_version("s3://bucket/shard-00.tar") != before
    finally:
        tar.write_bytes(content)
    with pytest.raises(UsageError, match=r"data\.root='s3://none/x' cannot be listed \("):
        object_store.find("s3://none/x")
    with object_store.open_file("s3://bucket/shard-00.tar") as file:
        file.seek(1000)
        assert (file.read(5000), file.tell()) == (content[1000:6000], 6000)
        assert file.read() == content[6000:]


def test_a_missing_package_is_named_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(
        UsageError, match=r"^gs:// needs the package gcsfs\. Install it: pip install 'mgpu-ddp\[cloud\]'\.$"
    ):
        object_store.find("gs://bucket/photos")


@pytest.mark.parametrize(("root", "name"), [("/", "gs://bucket/x.jpg"), ("gs://bucket", "x.jpg")])
def test_a_list_of_urls_needs_its_package_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    (tmp_path / "list.txt").write_text(f"s3://bucket/a.jpg\n{name}\n" if root == "/" else f"{name}\n")
    with pytest.raises(UsageError, match=r"^gs:// needs the package gcsfs\. Install it: "):
        read_list(ListConfig(path=str(tmp_path / "list.txt"), root=root))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_package_that_one_node_alone_lacks_ends_the_job_in_one_line(
    monkeypatch: pytest.MonkeyPatch, world: World, workers: int
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    samples = FileSamples("gs://bucket", Listing.build([b"x.jpg"]))
    with pytest.raises(StateError, match=r"^gs:// needs the package gcsfs\. Install it: "):
        load_all(samples, world, workers=workers)


def test_what_goes_over_by_itself_is_asked_for_again(proxy: s3.Proxy, folder: Path) -> None:
    faults = [*s3.SLOW_DOWN, "reset", (429, "TooMany")]
    proxy.fault = lambda number: faults[number // 3 % 4] if number % 3 == 0 else None
    asked = [object_store.start_read(f"s3://bucket/photos/{name}") for name in names(folder)]
    assert [each.result() for each in asked] == [(folder / "photos" / name).read_bytes() for name in names(folder)]
    assert {"SlowDown", "InternalError", "reset", "TooMany"} == set(proxy.faults)


def test_a_store_that_stays_away_ends_the_job_and_not_its_images(
    proxy: s3.Proxy, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://bucket/photos/{names(folder)[0]}"
    proxy.fault = lambda number: s3.SLOW_DOWN[0]
    with pytest.raises(StateError, match=rf"'{url}' could not be read in {retry.ATTEMPTS} attempts \(.*SlowDown"):
        object_store.start_read(url).result()
    assert proxy.asked == retry.ATTEMPTS
    s3.use(monkeypatch, 9)
    with pytest.raises(StateError, match=r"could not be read in 9 attempts \(EndpointConnectionError"):
        object_store.start_read(url).result()


def test_credentials_that_are_refused_end_the_job_at_once(
    proxy: s3.Proxy, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://bucket/photos/{names(folder)[0]}"
    proxy.fault = lambda number: s3.EXPIRED
    with pytest.raises(StateError, match=r"with these credentials \(.*ExpiredToken.* Renew them and start again"):
        object_store.start_read(url).result()
    assert proxy.asked == 1
    proxy.fault = lambda number: None
    s3.use(monkeypatch, proxy.port)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(StateError, match="cannot be read with these credentials") as refused:
        object_store.start_read(url).result()
    assert "another" not in str(refused.value)
    s3.use(monkeypatch, proxy.port)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StateError, match=r"\(NoCredentialsError"):
        object_store.start_read(url).result()


def test_what_is_wrong_with_one_image_is_its_own(proxy: s3.Proxy) -> None:
    with pytest.raises(FileNotFoundError):
        object_store.start_read("s3://bucket/photos/none.jpg").result()
    proxy.fault = lambda number: (403, "AccessDenied")
    before = proxy.asked
    with pytest.raises(PermissionError):
        object_store.start_read("s3://bucket/photos/none.jpg").result()
    assert proxy.asked == before + 1


def far_files(source: str) -> Any:
    """Configurations of the files of the bucket that hold many images or name them."""
    return {
        "list": ListConfig(path="s3://bucket/list.csv"),
        "webdataset": WebDatasetConfig(urls="s3://bucket/shard-{00..02}.tar", label_extension="cls"),
        "parquet": ParquetConfig(urls="s3://bucket/shard-{00..02}.parquet", label_column="label"),
    }[source]


REFUSED = r"s3://bucket/.*' cannot be read with these credentials \(.* Renew them and start again"


@pytest.mark.parametrize("source", ["list", "webdataset", "parquet"])
def test_a_token_that_expires_is_told_as_such_whichever_request_is_the_first_without(
    proxy: s3.Proxy, world: World, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some are HEAD, whose answer has no body that says why."""
    # So that a tar takes several.
    monkeypatch.setattr(object_store, "BUFFER_BYTES", 16384)

    def expiring(step: Callable[[], object]) -> list[str]:
        """The messages where the login expires at each request of a step in turn."""
        told = []
        while True:
            expires = proxy.asked + len(told)
            proxy.fault = lambda number, expires=expires: s3.EXPIRED if number > expires else None
            try:
                step()
            except StateError as error:
                told.append(str(error))
            else:
                proxy.fault = lambda number: None
                return told

    listing = expiring(lambda: open_source(far_files(source), world))
    files = list_source(far_files(source), world)

    def load() -> None:
        # A few images of the first archive and one of the last.
        some = ChosenSamples(open_samples(config_of(far_files(source)), files), np.array([0, 1, COUNT - 1]))
        assert load_all(some, world, workers=0).errors == {}

    loading = expiring(load)
    assert min(len(listing), len(loading)) >= 2
    assert all(re.search(REFUSED, said) for said in [*listing, *loading])


@pytest.mark.parametrize("source", ["list", "webdataset", "parquet"])
def test_a_wrong_secret_is_told_as_such_at_the_start(
    proxy: s3.Proxy, world: World, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(StateError, match=REFUSED):
        open_source(far_files(source), world)


@pytest.mark.parametrize("source", ["webdataset", "parquet"])
@pytest.mark.parametrize(
    ("fault", "at_start", "later"),
    [
        ((403, "AccessDenied"), r"\(as asked\)", "it may no longer be read"),
        ((404, "NoSuchKey"), r"\(bucket/shard-00\.\w+\)", "it is gone"),
    ],
)
def test_a_file_that_is_forbidden_or_gone_is_told_as_such(
    proxy: s3.Proxy, world: World, source: str, fault: tuple[int, str], at_start: str, later: str
) -> None:
    samples = open_source(far_files(source), world)
    proxy.fault = lambda number: fault
    with pytest.raises(UsageError, match=rf"data\.urls: '.*00\.\w+' cannot be read {at_start}\. Fix it"):
        open_source(far_files(source), world)
    with pytest.raises(StateError, match=rf"00\.\w+' has changed since it was indexed \({later}\)"):
        load_all(samples, world, workers=0)


def test_many_requests_are_in_flight_and_more_are_begun_before_they_are_needed(proxy: s3.Proxy, folder: Path) -> None:
    proxy.latency_s = 0.3
    some = names(folder)
    ahead = ReadAhead(lambda index: object_store.start_read(f"s3://bucket/photos/{some[index % COUNT]}"))
    ahead.expect(range(100))
    assert ahead.take(0) == (folder / "photos" / some[0]).read_bytes()
    assert [ahead.take(index) for index in range(1, 100)]
    assert proxy.most_at_once >= object_store.IN_FLIGHT // 2
    assert proxy.asked == 100
    ahead.expect([100, 101])
    ahead.expect([101])
    ahead.take(101)
    assert proxy.asked <= 102


SOURCES = ["folder", "list", "urls", "webdataset", "parquet"]


@pytest.mark.parametrize(("source", "workers"), [*((source, 2) for source in SOURCES), ("webdataset", 0)])
def test_every_source_gives_the_images_of_the_disk_over_a_bad_network(
    proxy: s3.Proxy, folder: Path, world: World, source: str, workers: int
) -> None:
    faults = [*s3.SLOW_DOWN, "reset"]
    proxy.fault = lambda number: faults[number // 4 % len(faults)] if number % 4 == 0 else None

    def data(root: str) -> Any:
        return {
            "folder": FolderConfig(root=f"{root}/photos"),
            "list": ListConfig(path=f"{root}/list.csv"),
            "urls": ListConfig(path=str(folder / "list.txt")),
            "webdataset": WebDatasetConfig(urls=f"{root}/shard-{{00..02}}.tar", label_extension="cls"),
            "parquet": ParquetConfig(urls=f"{root}/*.parquet", label_column="label", key_column="image.path"),
        }[source]

    far = open_source(data("s3://bucket"), world)
    got = load_all(far, world, workers=workers)
    near = open_source(ListConfig(path=str(folder / "list.csv")) if source == "urls" else data(str(folder)), world)
    want = load_all(near, world, workers=0)
    assert torch.equal(torch.stack(got.pixels), torch.stack(want.pixels))
    assert got.errors == want.errors == {}
    prefix = "s3://bucket/" if source == "urls" else ""
    assert [far.path(index) for index in range(COUNT)] == [f"{prefix}{near.path(index)}" for index in range(COUNT)]
    assert got.labels == ([-1] * COUNT if source == "urls" else want.labels)
    assert set(proxy.faults) >= {"SlowDown", "reset"}


@contextmanager
def listing_server(folder: Path) -> Iterator[int]:
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_a_server_that_sends_files_whole_cannot_hold_tars(folder: Path, world: World) -> None:
    whole = pytest.raises(StateError, match=r"shard-00.tar' sends whole files, not parts of them")
    with listing_server(folder.parent) as port, whole:
        open_source(WebDatasetConfig(urls=f"http://127.0.0.1:{port}/bucket/shard-00.tar"), world)


@pytest.mark.parametrize("source", ["folder", "webdataset", "parquet"])
def test_a_web_server_will_do(folder: Path, world: World, source: str, tmp_path: Path) -> None:
    def samples(root: str) -> Samples:
        data: Any = {
            "folder": FolderConfig(root=f"{root}/photos"),
            "webdataset": WebDatasetConfig(urls=f"{root}/shard-{{00..02}}.tar"),
            "parquet": ParquetConfig(urls=f"{root}/shard-0{{0,1,2}}.parquet"),
        }[source]
        return open_source(data, world)

    # rclone does not list folders in a way that fsspec understands, and Python's server sends no parts of files.
    by_rclone = s3.served(folder.parent, tmp_path / "log", "http")
    with listing_server(folder.parent) if source == "folder" else by_rclone as port:
        far, near = samples(f"http://127.0.0.1:{port}/bucket"), samples(str(folder))
        assert [far.path(index) for index in range(COUNT)] == [near.path(index) for index in range(COUNT)]
        got, want = load_all(far, world), load_all(near, world, workers=0)
        assert torch.equal(torch.stack(got.pixels), torch.stack(want.pixels))
        assert (got.labels, got.errors) == (want.labels, {})


def test_an_image_that_has_gone_is_one_bad_row(proxy: s3.Proxy, folder: Path, world: World, tmp_path: Path) -> None:
    lines = [*(folder / "list.txt").read_text().splitlines(), "s3://bucket/photos/gone.jpg"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    errors = load_all(open_source(ListConfig(path=str(tmp_path / "list.txt")), world), world).errors
    assert list(errors) == [COUNT]
    assert errors[COUNT].startswith("FileNotFoundError: ")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("https://me:secret@host/x", FolderConfig), "data.root must be a URL without user, password or query"),
        (("https://host/x?sig=secret", FolderConfig), "data.root must be a URL without user, password or query"),
        (("ftp://host/secret", FolderConfig), "data.root must be a path or a URL of s3, gs, hf, https, http, got"),
    ],
)
def test_locations_that_are_not_to_be_kept_are_refused(settings: tuple[str, Any], said: str) -> None:
    location, kind = settings
    with pytest.raises(UsageError, match=said) as refused:
        kind(root=location)
    assert "secret" not in str(refused.value) or location.startswith("ftp")
