"""Files that are there whole, or not at all."""

import json
from pathlib import Path

import pytest

from mgpu_ddp.output.atomic_files import create_file, replace_bytes, replace_json
from tests.support.run_folders import files_below


def test_replacing_a_file_leaves_no_temporaries(tmp_path: Path) -> None:
    for value in ([1], {"a": "☃"}):
        replace_json(tmp_path / "x.json", value)
        assert json.loads((tmp_path / "x.json").read_text()) == value
    assert files_below(tmp_path) == {"x.json"}


def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path: Path) -> None:
    replace_bytes(tmp_path / "x", b"old")
    with pytest.raises(TypeError):
        replace_json(tmp_path / "x", object())
    assert (tmp_path / "x").read_bytes() == b"old"


def test_a_name_that_is_taken_stays_with_its_owner(tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(b"committed")
    with pytest.raises(FileExistsError):
        create_file(tmp_path / "part", lambda file: file.write(b"late"))
    assert (tmp_path / "part").read_bytes() == b"committed"
    assert files_below(tmp_path) == {"part"}
