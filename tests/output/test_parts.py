"""Rows become durable parts, listed in order; retried rows take the place of error rows."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from mgpu_ddp.errors import ProofError, WriteError
from mgpu_ddp.output.manifest import Manifest
from mgpu_ddp.output.verify import error_rows, prove
from tests.support.run_folders import CLASSES, HOWS, SAMPLES, claim, files_below, wanted, write_parts, writer_of
from tests.support.samples import make_rows


@pytest.mark.parametrize("how", HOWS)
def test_parts_are_listed_whole_and_proved(tmp_path: Path, how: str) -> None:
    folder = claim(tmp_path, how)
    parts = write_parts(folder, 8, 12, 20)
    assert Manifest.read(tmp_path) == folder.manifest
    assert [(p.first, p.rows, p.errors) for p in parts] == [(0, 8, 1), (8, 4, 0), (12, 8, 1)]
    proof = prove(tmp_path, folder.claimed)
    assert (proof.total, proof.rows, proof.errors, proof.missing, proof.duplicates) == (20, 20, 2, 0, 0)
    assert files_below(tmp_path) == {"manifest.json", *(p.file for p in parts)}, "a temporary file was left"
    if how != "npy":
        assert [p.file for p in parts] == sorted(p.file for p in parts)
        assert all((tmp_path / p.file).stat().st_size == p.num_bytes for p in parts)


@pytest.mark.parametrize("first", [4, 12], ids=["again", "gap"])
def test_commit_refuses_what_does_not_follow(tmp_path: Path, first: int) -> None:
    folder = claim(tmp_path)
    write_parts(folder, 8)
    with pytest.raises(ProofError, match=f"begins at row {first}, but the table ends at row 8"):
        folder.open_table(writer_of(folder, "u")).add(make_rows(first, 4))
    on_disk = Manifest.read(tmp_path)
    assert on_disk is not None
    assert on_disk.prefix == 8


@pytest.mark.parametrize("damage", ["short", "missing"])
def test_commit_refuses_a_part_that_is_not_there_as_described(tmp_path: Path, damage: str) -> None:
    folder = claim(tmp_path)
    writer = writer_of(folder)
    part = writer.write(make_rows(0, 8))
    path = tmp_path / part.file
    if damage == "short":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    with pytest.raises(WriteError, match=r"does not have the \d+ bytes here"):
        folder.open_table(writer).list([part])


@pytest.mark.parametrize("how", HOWS)
def test_retried_rows_take_the_place_of_error_rows_alone(tmp_path: Path, how: str) -> None:
    folder = claim(tmp_path / "run", how)
    parts = write_parts(folder, 8, 12, 20)
    untouched = {p.file: (folder.path / p.file).read_bytes() for p in parts if p.errors == 0 and how != "npy"}
    retried = make_rows(0, 20, errors={17: "still bad"}, classes=CLASSES).take(np.array([3, 17]))
    table = folder.open_table(writer_of(folder, "again"), np.array([3, 17]))
    table.add(dataclasses.replace(retried, index=np.array([0, 1]), errors={1: "still bad"}, split=frozenset({0})))
    manifest = folder.claimed
    assert Manifest.read(folder.path) == manifest
    assert [(p.first, p.rows, p.errors, p.split_rows) for p in manifest.parts] == [
        (0, 8, 0, 1),
        (8, 4, 0, 0),
        (12, 8, 1, 0),
    ]
    proof = prove(folder.path, manifest)
    assert (proof.rows, proof.errors, proof.missing, proof.duplicates) == (20, 1, 0, 0)
    assert {file: (folder.path / file).read_bytes() for file in untouched} == untouched
    assert list(error_rows(folder.path, manifest, SAMPLES.path)) == [(17, SAMPLES.path(17), "still bad")]
    # The same table as one that was predicted with this outcome at once.
    at_once = claim(tmp_path / "at once", how)
    table = at_once.open_table(writer_of(at_once))
    for first, stop in ((0, 8), (8, 12), (12, 20)):
        errors = {17: "still bad"} if first == 12 else {}
        table.add(make_rows(first, stop - first, errors=errors, classes=CLASSES))
    assert [p.sha256 for p in manifest.parts] == [p.sha256 for p in at_once.claimed.parts]


def test_array_rows_that_are_being_retried_do_not_count_until_listed(tmp_path: Path) -> None:
    folder = claim(tmp_path, "npy")
    write_parts(folder, 20)
    writer_of(folder, "again").rewrite(folder.claimed.parts[0], make_rows(3, 1, classes=CLASSES))  # never listed
    proof = prove(tmp_path, claim(tmp_path, "npy").claimed)
    assert (proof.rows, proof.errors) == (20, 2)
    assert np.isnan(np.load(tmp_path / "predictions.npy")[3]).all()


@pytest.mark.parametrize("start", [0, 6])
def test_the_array_holds_every_row_in_its_place(tmp_path: Path, start: int) -> None:
    write_parts(claim(tmp_path, "npy", manifest=wanted("npy", start=start)), 8, 20)
    array = np.load(tmp_path / "predictions.npy", mmap_mode="r")
    assert (array.shape, array.dtype) == ((20 - start, CLASSES), np.float32)
    expected = make_rows(start, 20 - start, classes=CLASSES).columns["logits"].copy()
    expected[[i - start for i in (3, 17) if i >= start]] = np.nan
    assert np.array_equal(array, expected, equal_nan=True)
