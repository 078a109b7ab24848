"""Files that are not ours stay as they are, and no link is followed below a run folder."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from mgpu_ddp.errors import StateError, UsageError
from mgpu_ddp.output.folders import LOCK
from mgpu_ddp.output.layout import is_ours, lies_in_the_way
from mgpu_ddp.output.manifest import Manifest
from mgpu_ddp.output.replace import put_in_place
from mgpu_ddp.output.run_folder import RunFolder
from tests.support.run_folders import SAMPLES, claim, files_below, wanted, write_parts

PART = "predictions/part-000000000000-0123ab.parquet"
RESULT = (
    *(PART, ".hydra/config.yaml", "logs/rank0.log", "profile/rank3.json.gz", "predictions.npy", "listing.arrow"),
    *("errors.jsonl", "metrics.json", "classes.json", "report.html", "status.json"),
)
FOREIGN = ("thesis.csv", "predictions/notes.txt", "logs/access.log", ".hydra/own.yaml", ".cache.tmp", "profile/me.jpg")


def write(path: Path, text: str = "precious") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """Nothing in the folder changes in the block."""
    before = contents(folder)
    yield
    assert contents(folder) == before


def complete(run_dir: Path, how: str = "parquet") -> RunFolder:
    folder = claim(run_dir, how)
    write_parts(folder, 8, 20)
    folder.finish("complete", SAMPLES.path)
    return folder


@pytest.mark.parametrize("name", [*RESULT, f"{Path(PART).parent}/.{Path(PART).name}.0123abcd.tmp"])
def test_names_of_a_result(name: str) -> None:
    assert is_ours(name)
    assert lies_in_the_way(name)


@pytest.mark.parametrize(
    "name",
    [
        *(*FOREIGN, "predictions/part-00000-c000.snappy.parquet", f"../{PART}", f"logs/../{PART}", f"{PART}\n"),
        *(
            f"x/{PART}",
            "part-000000000000-0123ab.parquet",
            ".hydra/manifest.json",
            ".own.0123abcd.tmp",
            "logs/rank.log",
        ),
    ],
)
def test_names_of_others(name: str) -> None:
    assert not is_ours(name)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", RESULT)
def test_without_a_manifest_a_file_of_ours_is_somebody_elses(tmp_path: Path, name: str, overwrite: bool) -> None:
    write(tmp_path / "out" / name)
    with untouched(tmp_path), pytest.raises(UsageError, match=r"output\.dir must be empty or hold this job, got .* wi"):
        claim(tmp_path / "out", overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_files_beside_a_job_stay(tmp_path: Path, overwrite: bool) -> None:
    for name in FOREIGN:
        if not name.startswith("predictions"):
            write(tmp_path / name)
    complete(tmp_path)
    write(tmp_path / "predictions/notes.txt")
    write(tmp_path / "logs/rank0.log", "old")
    again = claim(tmp_path, "csv" if overwrite else "parquet", overwrite=overwrite)
    if overwrite:
        write_parts(again, 20, token="u")
    again.finish("complete", SAMPLES.path)
    again.publish()
    found = contents(tmp_path)
    assert {name for name in FOREIGN if found.get(name) == b"precious"} == {*FOREIGN}
    manifest = Manifest.read(tmp_path)
    assert manifest is not None
    logs = {"logs/rank0.log"} - ({"logs/rank0.log"} if overwrite else set())
    parts = {part.file for part in manifest.parts}
    assert files_below(tmp_path) == {*FOREIGN, *parts, *logs, "manifest.json", "status.json", "errors.jsonl"}
    assert not [path for path in tmp_path.iterdir() if path.name in (".next", ".ready", ".old")]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_foreign_table_among_the_parts_is_refused(tmp_path: Path, overwrite: bool) -> None:
    """A reader would take it for rows of ours."""
    complete(tmp_path)
    write(tmp_path / "predictions/thesis.csv")
    with (
        untouched(tmp_path),
        pytest.raises(UsageError, match=r"where 'predictions/thesis\.csv' is not of a job\. Move"),
    ):
        claim(tmp_path, overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", [".next", ".ready", ".old"])
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("file", ["build.js", LOCK])
def test_a_folder_of_another_tool_is_not_where_a_result_waits(
    tmp_path: Path, name: str, file: str, overwrite: bool, begun: bool
) -> None:
    if begun:
        complete(tmp_path)
    write(tmp_path / name / file, "")
    with untouched(tmp_path), pytest.raises(UsageError, match=rf"where '{name}/{re.escape(file)}' is not of a job"):
        claim(tmp_path, overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("names", [(), ("classes.json",), ("manifest.json",)])
def test_a_folder_by_the_name_of_a_waiting_result_is_not_one(
    tmp_path: Path, names: tuple[str, ...], overwrite: bool
) -> None:
    (tmp_path / ".ready").mkdir()
    for name in names:
        write(tmp_path / name)
    with pytest.raises(UsageError):
        claim(tmp_path, overwrite=overwrite)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".ready", *names]


def test_a_complete_result_does_not_take_the_place_of_somebody_elses(tmp_path: Path) -> None:
    complete(tmp_path / "out/.next")
    (tmp_path / "out/.next" / LOCK).unlink()
    write(tmp_path / "out/classes.json")
    with pytest.raises(UsageError, match=r"with foreign classes\.json"):
        claim(tmp_path / "out")
    assert (tmp_path / "out/classes.json").read_text() == "precious"
    (tmp_path / "out/.next").rename(tmp_path / "out/.ready")
    write(tmp_path / "out/status.json")
    with pytest.raises(StateError, match=r"status\.json is in the way"):
        put_in_place(tmp_path / "out")
    assert (tmp_path / "out/status.json").read_text() == "precious"


@pytest.mark.parametrize("text", ["{}", "12345", "held"])
def test_the_lock_of_another_tool_stays(tmp_path: Path, text: str) -> None:
    write(tmp_path / LOCK, text)
    if text == "held":  # as a crash may have torn ours
        claim(tmp_path)
        return
    with untouched(tmp_path), pytest.raises(UsageError, match=r"output\.dir must not hold a foreign \.lock"):
        claim(tmp_path)


KINDS = dict.fromkeys(
    ("predictions", ".hydra", "logs", "profile", ".next", ".ready", ".old"), "folder"
) | dict.fromkeys((*RESULT, LOCK, "manifest.json", ".next/manifest.json", ".ready/classes.json"), "file")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("by", ["link", "pipe"])
@pytest.mark.parametrize("name", KINDS)
def test_nothing_but_real_files_and_folders_bears_a_name_of_ours(
    tmp_path: Path, name: str, by: str, overwrite: bool
) -> None:
    complete(tmp_path / "out")
    (tmp_path / "victim" / "predictions").mkdir(parents=True)
    for victim in (PART, "rank0.log", "config.yaml", "thesis.csv"):
        write(tmp_path / "victim" / victim)
    path = tmp_path / "out" / name
    path.parent.mkdir(exist_ok=True)
    moved = tmp_path / "moved"
    if path.exists():
        path.rename(moved)
    if by == "pipe":
        os.mkfifo(path)
    elif KINDS[name] == "folder":
        path.symlink_to(moved if moved.exists() else tmp_path / "victim")
    else:
        path.symlink_to(moved if moved.exists() else tmp_path / "victim/thesis.csv")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(UsageError) as refused:
        claim(tmp_path / "out", manifest=wanted(stop=25), overwrite=overwrite)
    assert len(str(refused.value).splitlines()) == 1
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_dangling_link_makes_no_file_elsewhere(tmp_path: Path) -> None:
    for name in (LOCK, "manifest.json", "status.json", "logs"):
        run_dir = tmp_path / f"of {name}"
        run_dir.mkdir()
        (run_dir / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(UsageError):
            claim(run_dir)
        assert not (tmp_path / "elsewhere").exists()


def test_an_array_with_another_name_is_copied_before_it_is_written_to(tmp_path: Path) -> None:
    write_parts(claim(tmp_path / "out", "npy"), 8)
    os.link(tmp_path / "out/predictions.npy", tmp_path / "backup.npy")
    before = (tmp_path / "backup.npy").read_bytes()
    write_parts(claim(tmp_path / "out", "npy"), 20, token="u")
    assert (tmp_path / "backup.npy").read_bytes() == before
    assert not np.isnan(np.load(tmp_path / "out/predictions.npy")[18:]).any()


def test_a_run_folder_may_itself_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    complete(tmp_path / "out")
    assert claim(tmp_path / "out").claimed.complete
