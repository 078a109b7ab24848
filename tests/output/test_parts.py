"""The run folder: parts, the manifest, whose folder it is, and the final proof."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mgpu_ddp.config.schema import FakeConfig
from mgpu_ddp.data.fake import FakeSamples
from mgpu_ddp.data.samples import Samples
from mgpu_ddp.errors import ProofError, UsageError, WriteError
from mgpu_ddp.output import atomic_files, run_folder
from mgpu_ddp.output import verify as proofs
from mgpu_ddp.output.formats import FORMATS
from mgpu_ddp.output.manifest import Manifest, Part, write_status
from mgpu_ddp.output.parts import MendedTable, Table, open_writer
from tests.support.samples import make_rows, texts

CLASSES = 3
HOWS = [*FORMATS, "npy"]
REASON = 'ValueError: a "reason", on\ntwo lines ☃'


class Named(FakeSamples):
    """Fake samples with a name each."""

    def path(self, index: int) -> str | None:
        return f"class/{index},\n☃.png"

    def names(self, indices: npt.NDArray[np.int64]) -> Any:
        return texts(self.path(i) for i in indices)


SAMPLES: Samples = Named(FakeConfig(size=20))


def wanted(**changes: Any) -> Manifest:
    fingerprint = {"model.name": "resnet18", "seed": 0, "data.image_size": [3, 8, 8]}
    return Manifest(**({"fingerprint": fingerprint, "start": 0, "stop": 20, "batch_size": 4} | changes))


def claim(run_dir: Path, how: str = "parquet", *, manifest: Manifest | None = None, **changes: Any) -> Manifest:
    settings: dict[str, Any] = {"resume": True, "overwrite": False, "batch_size_given": False, "files": None}
    columns = CLASSES if how == "npy" else None
    return run_folder.claim_folder(run_dir, manifest or wanted(), array_columns=columns, **(settings | changes))


def write_parts(run_dir: Path, manifest: Manifest, how: str, *stops: int, token: str = "t") -> list[Part]:
    """Write and commit parts from the prefix to each stop; rows 3 and 17 are errors."""
    writer = open_writer(run_dir, how, SAMPLES.names, None, token, manifest.start)
    parts = []
    for stop in stops:
        first = manifest.prefix
        errors = {i: f"{REASON} {i}" for i in (3, 17) if first <= i < stop}
        parts.append(writer.write(make_rows(first, stop - first, errors=errors, classes=CLASSES)))
        Table(run_dir, manifest, writer).list(parts[-1:])
    return parts


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_manifest_comes_back_as_written(tmp_path: Path) -> None:
    assert Manifest.read(tmp_path) is None
    part = Part(file="f", first=0, rows=7, errors=1, num_bytes=9, sha256="x", reasons={"3": "why"})
    manifest = wanted(parts=[part], world_sizes=[2, 1], versions={"torch": "2"}, complete=True)
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert (manifest.prefix, manifest.errors, wanted(start=5).prefix) == (7, 1, 5)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"parts": []}', b'{"parts": [{"file": 1}]}', b"\xff\xfe", b'{"other": 1}']
)
def test_a_broken_manifest_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"manifest\.json must be a readable manifest, got \w+\. Choose another"):
        claim(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == content
    assert files_below(tmp_path) == {"manifest.json"}


def test_replacing_a_file_leaves_no_temporaries(tmp_path: Path) -> None:
    for value in ([1], {"a": "☃"}):
        atomic_files.replace_json(tmp_path / "x.json", value)
        assert json.loads((tmp_path / "x.json").read_text()) == value
    assert files_below(tmp_path) == {"x.json"}


def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path: Path) -> None:
    atomic_files.replace_bytes(tmp_path / "x", b"old")
    with pytest.raises(TypeError):
        atomic_files.replace_json(tmp_path / "x", object())
    assert (tmp_path / "x").read_bytes() == b"old"


@pytest.mark.parametrize("how", HOWS)
def test_parts_are_listed_whole_and_proved(tmp_path: Path, how: str) -> None:
    manifest = claim(tmp_path, how)
    parts = write_parts(tmp_path, manifest, how, 8, 12, 20)
    assert Manifest.read(tmp_path) == manifest
    assert [(p.first, p.rows, p.errors) for p in parts] == [(0, 8, 1), (8, 4, 0), (12, 8, 1)]
    proof = proofs.prove(tmp_path, manifest, how)
    assert (proof.total, proof.rows, proof.errors, proof.missing, proof.duplicates) == (20, 20, 2, 0, 0)
    expected = {"manifest.json", *(p.file for p in parts)}
    assert files_below(tmp_path) == expected, "a temporary file was left"
    if how != "npy":
        assert [p.file for p in parts] == sorted(p.file for p in parts)
        assert all((tmp_path / p.file).stat().st_size == p.num_bytes for p in parts)


@pytest.mark.parametrize("how", HOWS)
def test_a_restart_continues_at_the_prefix(tmp_path: Path, how: str) -> None:
    write_parts(tmp_path, claim(tmp_path, how, manifest=wanted(world_sizes=[4])), how, 8)
    manifest = claim(tmp_path, how, manifest=wanted(world_sizes=[2]))
    assert (manifest.prefix, manifest.world_sizes, manifest.complete) == (8, [4, 2], False)
    write_parts(tmp_path, manifest, how, 20, token="u")
    assert proofs.prove(tmp_path, manifest, how).missing == 0


def test_a_restart_keeps_the_batch_size_unless_one_is_given(tmp_path: Path) -> None:
    write_parts(tmp_path, claim(tmp_path), "parquet", 8)
    assert claim(tmp_path, manifest=wanted(batch_size=16)).batch_size == 4
    assert claim(tmp_path, manifest=wanted(batch_size=16), batch_size_given=True).batch_size == 16


def test_a_complete_folder_stays_complete(tmp_path: Path) -> None:
    manifest = claim(tmp_path)
    write_parts(tmp_path, manifest, "parquet", 20)
    manifest.complete = True
    manifest.write(tmp_path)
    assert claim(tmp_path).complete
    (tmp_path / manifest.parts[0].file).unlink()
    again = claim(tmp_path)
    assert (again.complete, again.prefix) == (False, 0)


@pytest.mark.parametrize("how", FORMATS)
def test_what_the_manifest_does_not_list_is_deleted(tmp_path: Path, how: str) -> None:
    manifest = claim(tmp_path, how)
    (kept,) = write_parts(tmp_path, manifest, how, 8)
    writer = open_writer(tmp_path, how, SAMPLES.names, None, "dead", 0)
    writer.write(make_rows(8, 4))  # written, never committed
    (tmp_path / "predictions/.part-x.tmp").touch()
    (tmp_path / "predictions/notes.txt").touch()
    claim(tmp_path, how)
    assert files_below(tmp_path / "predictions") == {Path(kept.file).name}


@pytest.mark.parametrize("damage", ["truncated", "grown", "missing"])
@pytest.mark.parametrize("how", FORMATS)
def test_a_damaged_part_is_predicted_again_with_all_after_it(tmp_path: Path, how: str, damage: str) -> None:
    parts = write_parts(tmp_path, claim(tmp_path, how), how, 4, 8, 20)
    path = tmp_path / parts[1].file
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-5] if damage == "truncated" else data + b"\n")
    manifest = claim(tmp_path, how)
    assert manifest.parts == parts[:1]
    assert files_below(tmp_path / "predictions") == {Path(parts[0].file).name}
    assert Manifest.read(tmp_path) == manifest


def test_a_truncated_array_is_predicted_again(tmp_path: Path) -> None:
    write_parts(tmp_path, claim(tmp_path, "npy"), "npy", 8, 20)
    path = tmp_path / "predictions.npy"
    path.write_bytes(path.read_bytes()[:-40])
    manifest = claim(tmp_path, "npy")
    assert manifest.prefix <= 8, "rows that are no longer there count as done"
    write_parts(tmp_path, manifest, "npy", 20)
    assert np.isfinite(np.load(path)[[0, 7, 8, 19]]).all()
    assert np.array_equal(np.load(path)[19], make_rows(19, 1).columns["logits"][0])


def test_another_job_is_refused_and_its_keys_are_named(tmp_path: Path) -> None:
    write_parts(tmp_path, claim(tmp_path), "parquet", 8)
    before = {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path)}
    other = wanted(fingerprint={**wanted().fingerprint, "seed": 7, "data.size": 20}, stop=10)
    with pytest.raises(UsageError) as raised:
        claim(tmp_path, manifest=other)
    text = str(raised.value)
    assert "output.dir must hold this same job" in text
    assert "seed=0 there, 7 here" in text
    assert "data.size=None there, 20 here" in text
    assert "samples=[0, 20] there, [0, 10] here" in text
    assert "model.name" not in text
    assert "\n" not in text
    assert {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path)} == before


@pytest.mark.parametrize("what", ["predictions", "predictions.npy"])
def test_foreign_predictions_are_never_touched(tmp_path: Path, what: str) -> None:
    foreign = tmp_path / what
    if what == "predictions":
        foreign.mkdir()
        foreign /= "mine.txt"
    foreign.write_text("precious")
    with pytest.raises(UsageError, match=r"output\.dir must be empty or hold this job.*foreign predictions"):
        claim(tmp_path)
    assert foreign.read_text() == "precious"


def test_resume_false_refuses_what_is_there(tmp_path: Path) -> None:
    claim(tmp_path / "fresh", resume=False)
    with pytest.raises(UsageError, match=r"output\.dir must be empty with resume=false"):
        claim(tmp_path / "fresh", resume=False)


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize(("before", "after"), [("parquet", "csv"), ("csv", "npy"), ("npy", "npy"), ("npy", "jsonl")])
def test_overwrite_starts_afresh(tmp_path: Path, before: str, after: str, resume: bool) -> None:
    write_parts(tmp_path, claim(tmp_path, before), before, 20)
    other = wanted(fingerprint={"model.name": "vgg11"}, stop=12)
    manifest = claim(tmp_path, after, manifest=other, overwrite=True, resume=resume)
    assert (manifest.prefix, manifest.complete) == (0, False)
    write_parts(tmp_path, manifest, after, 12, token="u")
    assert files_below(tmp_path) == {"manifest.json", *(p.file for p in manifest.parts)}
    assert proofs.prove(tmp_path, manifest, after).rows == 12


def test_a_folder_that_cannot_be_made_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError) as raised:
        claim(tmp_path / "file" / "run")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("first", [4, 12], ids=["again", "gap"])
def test_commit_refuses_what_does_not_follow(tmp_path: Path, first: int) -> None:
    manifest = claim(tmp_path)
    write_parts(tmp_path, manifest, "parquet", 8)
    writer = open_writer(tmp_path, "parquet", SAMPLES.names, None, "u", 0)
    with pytest.raises(ProofError, match=f"must begin at 8, got {first}"):
        Table(tmp_path, manifest, writer).add(make_rows(first, 4))
    on_disk = Manifest.read(tmp_path)
    assert on_disk is not None
    assert on_disk.prefix == 8


@pytest.mark.parametrize("damage", ["short", "missing"])
def test_commit_refuses_a_part_that_is_not_there_as_described(tmp_path: Path, damage: str) -> None:
    manifest = claim(tmp_path)
    writer = open_writer(tmp_path, "parquet", SAMPLES.names, None, "t", 0)
    part = writer.write(make_rows(0, 8))
    path = tmp_path / part.file
    if damage == "short":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    with pytest.raises(WriteError, match=r"must hold .* bytes"):
        Table(tmp_path, manifest, writer).list([part])


def put_rows(run_dir: Path, manifest: Manifest, how: str, number: int, index: list[int]) -> None:
    """Make a listed part hold other rows than it should, as a defect of a writer would."""
    fake = open_writer(run_dir, how, SAMPLES.names, None, "fake", 0).write(make_rows(0, 20).take(np.array(index)))
    part = manifest.parts[number]
    (run_dir / fake.file).replace(run_dir / part.file)
    manifest.parts[number] = dataclasses.replace(part, num_bytes=fake.num_bytes, sha256=fake.sha256)


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize(
    ("tampered", "missing", "duplicates"),
    [
        ({1: [8, 9, 10, 12, 13, 14, 15]}, 1, 0),
        ({1: [8, 9, 10, 11, 12, 13, 14]}, 1, 0),
        ({1: [8, 9, 10, 11, 12, 13, 14, 15, 15]}, 0, 1),
        ({1: [8, 9, 9, 11, 12, 13, 14, 15]}, 1, 1),
        ({1: [0, 9, 10, 11, 12, 13, 14, 15]}, 1, 1),
        ({0: [*range(7)], 1: [*range(8, 17)]}, 1, 1),
    ],
    ids=["missing", "last missing", "doubled", "both", "of another part", "each part off by one"],
)
def test_the_proof_counts_what_the_parts_really_hold(
    tmp_path: Path, how: str, tampered: dict[int, list[int]], missing: int, duplicates: int
) -> None:
    manifest = claim(tmp_path, how)
    write_parts(tmp_path, manifest, how, 8, 16, 20)
    for number, index in tampered.items():
        put_rows(tmp_path, manifest, how, number, index)
    proof = proofs.prove(tmp_path, manifest, how)
    assert (proof.missing, proof.duplicates) == (missing, duplicates)
    assert proof.rows == 20 - missing + duplicates


@pytest.mark.parametrize("how", HOWS)
def test_changed_bytes_do_not_pass_for_what_was_committed(tmp_path: Path, how: str) -> None:
    write_parts(tmp_path, claim(tmp_path, how), how, 8)
    path = next(path for path in tmp_path.rglob("pred*") if path.is_file() or any(path.iterdir()))
    path = path if path.is_file() else next(path.iterdir())
    data = bytearray(path.read_bytes())
    place = data.index(make_rows(2, 1).columns["logits"].tobytes()) if how == "npy" else len(data) // 2
    data[place] ^= 1
    path.write_bytes(data)
    manifest = claim(tmp_path, how)
    if manifest.prefix != 0:
        write_parts(tmp_path, manifest, how, 20, token="u")
        with pytest.raises(ProofError):
            proofs.prove(tmp_path, manifest, how)


def test_the_proof_counts_what_is_not_listed_yet(tmp_path: Path) -> None:
    manifest = claim(tmp_path)
    write_parts(tmp_path, manifest, "parquet", 8)
    assert proofs.prove(tmp_path, manifest, "parquet").missing == 12


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("damage", ["foreign", "gone"])
def test_the_proof_refuses_a_folder_that_differs_from_the_manifest(tmp_path: Path, how: str, damage: str) -> None:
    manifest = claim(tmp_path, how)
    parts = write_parts(tmp_path, manifest, how, 8, 20)
    path = tmp_path / parts[0].file
    if damage == "foreign":
        shutil.copy(path, path.with_name(f"part-copy{path.suffix}"))
    else:
        path.unlink()
    with pytest.raises(ProofError, match="must hold the parts of the manifest"):
        proofs.prove(tmp_path, manifest, how)


@pytest.mark.parametrize("how", HOWS)
def test_no_samples_at_all(tmp_path: Path, how: str) -> None:
    manifest = claim(tmp_path, how, manifest=wanted(stop=0))
    open_writer(tmp_path, how, SAMPLES.names, None, "t", 0)
    assert proofs.prove(tmp_path, manifest, how).total == 0
    if how == "npy":
        assert np.load(tmp_path / "predictions.npy", mmap_mode="r").shape == (0, CLASSES)
    proofs.write_errors(tmp_path, manifest, how, SAMPLES.path)
    assert (tmp_path / "errors.jsonl").read_bytes() == b""


@pytest.mark.parametrize("start", [0, 6])
def test_the_array_holds_every_row_in_its_place(tmp_path: Path, start: int) -> None:
    manifest = claim(tmp_path, "npy", manifest=wanted(start=start))
    write_parts(tmp_path, manifest, "npy", 8, 20)
    array = np.load(tmp_path / "predictions.npy", mmap_mode="r")
    assert (array.shape, array.dtype) == ((20 - start, CLASSES), np.float32)
    expected = make_rows(start, 20 - start, classes=CLASSES).columns["logits"].copy()
    expected[[i - start for i in (3, 17) if i >= start]] = np.nan
    assert np.array_equal(array, expected, equal_nan=True)


def test_an_array_of_another_length_is_refused(tmp_path: Path) -> None:
    manifest = claim(tmp_path, "npy")
    write_parts(tmp_path, manifest, "npy", 20)
    np.save(tmp_path / "predictions.npy", np.zeros((19, CLASSES), np.float32))
    with pytest.raises(ProofError, match="must have 20 rows, got 19"):
        proofs.prove(tmp_path, manifest, "npy")


@pytest.mark.parametrize("how", HOWS)
def test_errors_are_derived_from_the_parts(tmp_path: Path, how: str) -> None:
    manifest = claim(tmp_path, how)
    write_parts(tmp_path, manifest, how, 8, 12, 20)
    proofs.write_errors(tmp_path, manifest, how, SAMPLES.path)
    found = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    assert found == [{"index": i, "path": SAMPLES.path(i), "reason": f"{REASON} {i}"} for i in (3, 17)]


def test_a_name_that_is_taken_stays_with_its_owner(tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(b"committed")
    with pytest.raises(FileExistsError):
        atomic_files.create_file(tmp_path / "part", lambda file: file.write(b"late"))
    assert (tmp_path / "part").read_bytes() == b"committed"
    assert files_below(tmp_path) == {"part"}


@pytest.mark.parametrize("how", HOWS)
def test_retried_rows_take_the_place_of_error_rows_alone(tmp_path: Path, how: str) -> None:
    manifest = claim(tmp_path, how)
    parts = write_parts(tmp_path, manifest, how, 8, 12, 20)
    untouched = {p.file: (tmp_path / p.file).read_bytes() for p in parts if p.errors == 0 and how != "npy"}
    writer = open_writer(tmp_path, how, SAMPLES.names, None, "again", 0)
    table = MendedTable(tmp_path, manifest, writer, np.array([3, 17]))
    retried = make_rows(0, 20, errors={17: "still bad"}, classes=CLASSES).take(np.array([3, 17]))
    table.add(dataclasses.replace(retried, index=np.array([0, 1]), errors={1: "still bad"}, split=frozenset({0})))
    assert Manifest.read(tmp_path) == manifest
    assert [(p.first, p.rows, p.errors, p.split_rows) for p in manifest.parts] == [
        (0, 8, 0, 1),
        (8, 4, 0, 0),
        (12, 8, 1, 0),
    ]
    proof = proofs.prove(tmp_path, manifest, how)
    assert (proof.rows, proof.errors, proof.missing, proof.duplicates) == (20, 1, 0, 0)
    assert {file: (tmp_path / file).read_bytes() for file in untouched} == untouched
    assert list(proofs.error_rows(tmp_path, manifest, how, SAMPLES.path)) == [(17, SAMPLES.path(17), "still bad")]
    # The same table as one that was predicted with this outcome at once.
    at_once = claim(tmp_path / "at once", how)
    writer = open_writer(tmp_path / "at once", how, SAMPLES.names, None, "t", 0)
    table = Table(tmp_path / "at once", at_once, writer)
    for first, stop in ((0, 8), (8, 12), (12, 20)):
        errors = {17: "still bad"} if first == 12 else {}
        table.add(make_rows(first, stop - first, errors=errors, classes=CLASSES))
    assert [p.sha256 for p in manifest.parts] == [p.sha256 for p in at_once.parts]


def test_array_rows_that_are_being_retried_do_not_count_until_listed(tmp_path: Path) -> None:
    manifest = claim(tmp_path, "npy")
    write_parts(tmp_path, manifest, "npy", 20)
    writer = open_writer(tmp_path, "npy", SAMPLES.names, None, "again", 0)
    writer.rewrite(manifest.parts[0], make_rows(3, 1, classes=CLASSES))  # written, never listed
    proof = proofs.prove(tmp_path, claim(tmp_path, "npy"), "npy")
    assert (proof.rows, proof.errors) == (20, 2)
    assert np.isnan(np.load(tmp_path / "predictions.npy")[3]).all()


@pytest.mark.parametrize("how", HOWS)
def test_a_folder_grows_with_its_input(tmp_path: Path, how: str) -> None:
    manifest = claim(tmp_path, how)
    write_parts(tmp_path, manifest, how, 20)
    manifest.complete = True
    manifest.write(tmp_path)
    grown = claim(tmp_path, how, manifest=wanted(stop=25))
    assert (grown.prefix, grown.stop, grown.complete) == (20, 25, False)
    write_parts(tmp_path, grown, how, 25, token="u")
    proof = proofs.prove(tmp_path, grown, how)
    assert (proof.rows, proof.missing, proof.errors) == (25, 0, 2)
    if how == "npy":
        expected = make_rows(0, 25, classes=CLASSES).columns["logits"].copy()
        expected[[3, 17]] = np.nan
        assert np.array_equal(np.load(tmp_path / "predictions.npy"), expected, equal_nan=True)


@pytest.mark.parametrize(("status", "reason"), [("running", None), ("failed", "why")])
def test_status_counts_every_sample(tmp_path: Path, status: str, reason: str | None) -> None:
    manifest = claim(tmp_path)
    write_parts(tmp_path, manifest, "parquet", 8)
    write_status(tmp_path, status, manifest, reason)
    assert json.loads((tmp_path / "status.json").read_text()) == {
        "status": status,
        "reason": reason,
        "counts": {"total": 20, "ok": 7, "error": 1, "missing": 12},
    }
