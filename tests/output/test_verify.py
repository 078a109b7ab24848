"""The final proof reads what is on disk, and errors.jsonl is derived from it."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mgpu_ddp.errors import ProofError
from mgpu_ddp.output.formats import FORMATS
from mgpu_ddp.output.run_folder import RunFolder
from mgpu_ddp.output.verify import Proof, prove, write_errors
from tests.support.run_folders import CLASSES, FAILED, HOWS, REASON, SAMPLES, claim, wanted, write_parts, writer_of
from tests.support.samples import make_rows


def proof_of(folder: RunFolder) -> Proof:
    return prove(folder.path, folder.claimed)


def put_rows(folder: RunFolder, number: int, index: list[int]) -> None:
    """Make a listed part hold other rows than it should, as a defect of a writer would."""
    fake = writer_of(folder, "fake").write(make_rows(0, 20).take(np.array(index)))
    part = folder.claimed.parts[number]
    (folder.path / fake.file).replace(folder.path / part.file)
    folder.claimed.parts[number] = dataclasses.replace(part, num_bytes=fake.num_bytes, sha256=fake.sha256)


BOTH = {1: [8, 9, 9, 11, 12, 13, 14, 15]}


@pytest.mark.parametrize(
    ("how", "tampered", "missing", "duplicates"),
    [
        ("parquet", {1: [8, 9, 10, 12, 13, 14, 15]}, 1, 0),
        ("parquet", {1: [8, 9, 10, 11, 12, 13, 14]}, 1, 0),
        ("parquet", {1: [8, 9, 10, 11, 12, 13, 14, 15, 15]}, 0, 1),
        ("parquet", BOTH, 1, 1),
        ("csv", BOTH, 1, 1),
        ("jsonl", BOTH, 1, 1),
        ("parquet", {1: [0, 9, 10, 11, 12, 13, 14, 15]}, 1, 1),
        ("parquet", {0: [*range(7)], 1: [*range(8, 17)]}, 1, 1),
    ],
    ids=[
        "missing",
        "last missing",
        "twice",
        "both",
        "both in csv",
        "both in jsonl",
        "of another part",
        "each part off by one",
    ],
)
def test_it_counts_what_the_parts_really_hold(
    tmp_path: Path, how: str, tampered: dict[int, list[int]], missing: int, duplicates: int
) -> None:
    folder = claim(tmp_path, how)
    write_parts(folder, 8, 16, 20)
    for number, index in tampered.items():
        put_rows(folder, number, index)
    proof = proof_of(folder)
    assert (proof.missing, proof.duplicates) == (missing, duplicates)
    assert proof.rows == 20 - missing + duplicates
    with pytest.raises(ProofError, match=rf"does not hold each of 20 samples once: {proof.rows} rows, {missing} miss"):
        folder.finish("complete", SAMPLES.path)
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("listed", [0, 2])
def test_it_counts_the_errors_that_the_parts_really_hold(tmp_path: Path, how: str, listed: int) -> None:
    folder = claim(tmp_path, how)
    write_parts(folder, 8, 20)
    folder.claimed.parts[0] = dataclasses.replace(folder.claimed.parts[0], errors=listed)
    with pytest.raises(ProofError, match=rf"holds 1 error row, but manifest\.json says {listed}"):
        folder.finish("complete", SAMPLES.path)
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("how", ["parquet", "npy"])
def test_changed_bytes_do_not_pass_for_what_was_committed(tmp_path: Path, how: str) -> None:
    (part,) = write_parts(claim(tmp_path, how), 8)
    path = tmp_path / part.file
    data = bytearray(path.read_bytes())
    place = data.index(make_rows(2, 1).columns["logits"].tobytes()) if how == "npy" else len(data) // 2
    data[place] ^= 1
    path.write_bytes(data)
    folder = claim(tmp_path, how)
    write_parts(folder, 20, token="u")
    with pytest.raises(ProofError, match="has other bytes than were committed"):
        proof_of(folder)


def test_it_counts_what_is_not_listed_yet(tmp_path: Path) -> None:
    folder = claim(tmp_path)
    write_parts(folder, 8)
    assert proof_of(folder).missing == 12


@pytest.mark.parametrize("damage", ["foreign", "gone"])
def test_it_refuses_a_folder_that_differs_from_the_manifest(tmp_path: Path, damage: str) -> None:
    folder = claim(tmp_path)
    parts = write_parts(folder, 8, 20)
    path = tmp_path / parts[0].file
    if damage == "foreign":
        shutil.copy(path, path.with_name(f"part-copy{path.suffix}"))
    else:
        path.unlink()
    with pytest.raises(ProofError, match="differ in"):
        proof_of(folder)


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("content", [b"", b"no table", b"PAR1" * 9, b'{"index": "a"}\n{"index": [1]}\n', b"index\nx\n"])
def test_what_is_no_table_is_told_in_one_line(tmp_path: Path, how: str, content: bytes) -> None:
    """Also with the checksum that the manifest has."""
    folder = claim(tmp_path, how)
    (part, _) = write_parts(folder, 8, 20)
    (tmp_path / part.file).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    folder.claimed.parts[0] = dataclasses.replace(part, num_bytes=len(content), sha256=digest)
    with pytest.raises(ProofError, match=rf"{part.file} cannot be read \(.*\)\. Delete it and start again\.$"):
        proof_of(folder)


def test_an_array_of_another_length_is_refused(tmp_path: Path) -> None:
    folder = claim(tmp_path, "npy")
    write_parts(folder, 20)
    np.save(tmp_path / "predictions.npy", np.zeros((19, CLASSES), np.float32))
    with pytest.raises(ProofError, match="has 19 rows instead of 20"):
        proof_of(folder)


@pytest.mark.parametrize("how", HOWS)
def test_no_samples_at_all(tmp_path: Path, how: str) -> None:
    folder = claim(tmp_path, how, manifest=wanted(how, stop=0))
    writer_of(folder)
    assert folder.finish("complete", SAMPLES.path).total == 0
    if how == "npy":
        assert np.load(tmp_path / "predictions.npy", mmap_mode="r").shape == (0, CLASSES)
    assert (tmp_path / "errors.jsonl").read_bytes() == b""


@pytest.mark.parametrize("how", HOWS)
def test_errors_are_derived_from_the_parts(tmp_path: Path, how: str) -> None:
    folder = claim(tmp_path, how)
    write_parts(folder, 8, 12, 20)
    write_errors(tmp_path, folder.claimed, SAMPLES.path)
    found = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    assert found == [{"index": i, "path": SAMPLES.path(i), "reason": f"{REASON} {i}"} for i in FAILED]
