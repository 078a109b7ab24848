"""Code that a killed compiler has left in Inductor's cache is compiled again."""

from dataclasses import replace
from pathlib import Path

import markupsafe._speedups
import pytest
from torch.utils._filelock import FileLock

from mgpu_ddp.models.compile_cache import remove_truncated_libraries
from tests.support.runs import assert_proved
from tests.support.starting import SMALL, ranks, run

WHOLE = Path(markupsafe._speedups.__file__).read_bytes()


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of a library in a cache."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    path = tmp_path / "ab" / "cabc.main.so"
    path.parent.mkdir()
    return path


@pytest.mark.parametrize("length", [0, 10, 64, len(WHOLE) // 2, len(WHOLE) - 1])
def test_a_library_that_is_not_whole_is_removed(library: Path, length: int) -> None:
    library.write_bytes(WHOLE[:length])
    remove_truncated_libraries()
    assert not library.exists()


def test_a_library_whose_header_was_never_written_is_removed(library: Path) -> None:
    library.write_bytes(bytes(64) + WHOLE[64:])
    remove_truncated_libraries()
    assert not library.exists()


def test_a_whole_library_and_one_being_written_stay(library: Path) -> None:
    library.write_bytes(WHOLE)
    remove_truncated_libraries()
    assert library.read_bytes() == WHOLE
    library.write_bytes(b"")
    with FileLock(library.parents[1] / "locks" / "cabc.lock"):
        remove_truncated_libraries()
    assert library.exists()


@pytest.mark.slow
def test_a_job_compiles_again_what_a_killed_one_left(tmp_path: Path) -> None:
    settings = (*SMALL, "data.size=8", "loader.workers=0", "runtime.compile=on")
    cache = tmp_path / "cache"
    environs = [{"TORCHINDUCTOR_CACHE_DIR": str(cache)}]
    for run_dir in ("before", "after"):
        ended = run(replace(ranks(1, *settings, f"output.dir={run_dir}"), environs=environs), tmp_path)
        assert ended.code == 0, ended.err
        assert_proved(tmp_path / run_dir, 8)
        libraries = list(cache.glob("*/*.main.so"))
        assert libraries
        for library in libraries:
            library.write_bytes(b"")
