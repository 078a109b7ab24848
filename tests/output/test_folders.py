"""Folders are made whole or not at all, and removed again while they are empty."""

from pathlib import Path

import pytest

from mgpu_ddp.errors import UsageError
from mgpu_ddp.output.folders import make_folder, remove_empty


def test_make_folder_reports_what_it_made_so_that_it_can_be_undone(tmp_path: Path) -> None:
    made = make_folder(tmp_path / "a/b/c")
    assert made == [tmp_path / "a/b/c", tmp_path / "a/b", tmp_path / "a"]
    assert make_folder(tmp_path / "a/b/c") == []
    (tmp_path / "a/keep").touch()
    remove_empty(made)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["keep"]


def test_make_folder_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"output\.dir must be a writable folder, got '.*file/x/y'"):
        make_folder(tmp_path / "file/x/y")
    with pytest.raises(UsageError, match=r"output\.dir must be a writable folder"):
        make_folder(tmp_path / "new" / ("n" * 300))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
