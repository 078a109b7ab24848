"""Inputs that are no regular files: one line from every reader, at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mgpu_ddp.config.schema import ListConfig, ParquetConfig, WebDatasetConfig
from mgpu_ddp.data.array import open_array
from mgpu_ddp.data.input_file import open_input
from mgpu_ddp.data.list_file import read_list
from mgpu_ddp.data.parquet import index_parquet
from mgpu_ddp.data.tar import index_tar
from mgpu_ddp.errors import UsageError
from tests.support.special_files import SPECIAL, special_file

READERS: dict[str, Callable[[str], Any]] = {
    "x.txt": lambda path: read_list(ListConfig(path=path)),
    "x.csv": lambda path: read_list(ListConfig(path=path)),
    "list.parquet": lambda path: read_list(ListConfig(path=path)),
    "x.npy": open_array,
    "x.tar": lambda path: index_tar(WebDatasetConfig(urls=path), path, "x.tar"),
    "images.parquet": lambda path: index_parquet(ParquetConfig(urls=path), path, "images.parquet"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_regular_file_is_refused_in_one_line(tmp_path: Path, kind: str, name: str) -> None:
    path = special_file(kind, tmp_path / name)
    with pytest.raises(UsageError) as raised:
        READERS[name](str(path))
    assert str(raised.value).startswith(("data.path", "data.urls"))
    assert f"{str(path)!r} cannot be read" in str(raised.value)
    assert f"({SPECIAL[kind]})" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_empty_file_and_a_link_to_a_file_are_regular(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "full").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("full")
    for name, content in (("empty", b""), ("full", b"abc"), ("link", b"abc")):
        with open_input(tmp_path / name) as file:
            assert file.read() == content
