"""Whose folder it is, what a claim makes of it, and how it ends."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from mgpu_ddp.errors import ProofError, StateError, UsageError
from mgpu_ddp.output.folders import LOCK
from mgpu_ddp.output.manifest import Manifest, Start
from mgpu_ddp.output.run_folder import RunFolder
from tests.support.run_folders import CLASSES, FAILED, SAMPLES, claim, files_below, wanted, write_parts, writer_of
from tests.support.samples import make_rows


def status_of(run_dir: Path) -> dict[str, str]:
    return dict(json.loads((run_dir / "status.json").read_text()))


@pytest.mark.parametrize("how", ["parquet", "npy"])
def test_a_restart_continues_at_the_prefix(tmp_path: Path, how: str) -> None:
    write_parts(claim(tmp_path, how, manifest=wanted(how, world_sizes=[4])), 8)
    folder = claim(tmp_path, how, manifest=wanted(how, world_sizes=[2]))
    manifest = folder.claimed
    assert (manifest.prefix, manifest.world_sizes, manifest.complete) == (8, [4, 2], False)
    write_parts(folder, 20, token="u")
    assert folder.finish("complete", SAMPLES.path).missing == 0


def test_a_restart_keeps_the_batch_size_unless_one_is_given(tmp_path: Path) -> None:
    write_parts(claim(tmp_path), 8)
    assert claim(tmp_path, manifest=wanted(batch_size=16)).claimed.batch_size == 4
    assert claim(tmp_path, manifest=wanted(batch_size=16), batch_size_given=True).claimed.batch_size == 16


def test_a_complete_folder_stays_complete(tmp_path: Path) -> None:
    folder = claim(tmp_path)
    write_parts(folder, 20)
    folder.finish("complete", SAMPLES.path)
    again = claim(tmp_path)
    again.mark_running()
    assert again.claimed.complete
    assert status_of(tmp_path)["status"] == "complete"
    (tmp_path / folder.claimed.parts[0].file).unlink()
    again = claim(tmp_path)
    assert (again.claimed.complete, again.claimed.prefix) == (False, 0)
    assert status_of(tmp_path)["status"] == "running"


def test_the_time_of_every_start_that_had_something_to_do_is_kept(tmp_path: Path) -> None:
    """Also of one that was killed, until its last commit, and of one that retried."""

    def start(rows_before: int) -> RunFolder:
        return claim(tmp_path, manifest=wanted(starts=[Start(began=time.time() - 100 - rows_before, ranks=2)]))

    write_parts(start(0), 8)
    write_parts(folder := start(8), 12, 20, token="u")
    folder.finish("complete", SAMPLES.path)
    idle = start(20)
    idle.finish("complete", SAMPLES.path)
    retrying = start(20)
    retried = np.array(FAILED)
    retrying.open_table(writer_of(retrying, "v"), retried).add(make_rows(0, len(retried), classes=CLASSES))
    retrying.finish("complete", SAMPLES.path)
    manifest = Manifest.read(tmp_path)
    assert manifest is not None
    assert [(each.ranks, each.rows) for each in manifest.starts] == [(2, 8), (2, 12), (2, 2)]
    assert [each.wall_s for each in manifest.starts] == pytest.approx([100, 108, 120], abs=20)


@pytest.mark.parametrize("how", ["parquet", "npy"])
def test_a_folder_grows_with_its_input(tmp_path: Path, how: str) -> None:
    folder = claim(tmp_path, how)
    write_parts(folder, 20)
    folder.finish("complete", SAMPLES.path)
    grown = claim(tmp_path, how, manifest=wanted(how, stop=25))
    assert (grown.claimed.prefix, grown.claimed.stop, grown.claimed.complete) == (20, 25, False)
    write_parts(grown, 25, token="u")
    proof = grown.finish("complete", SAMPLES.path)
    assert (proof.rows, proof.missing, proof.errors) == (25, 0, 2)
    if how == "npy":
        expected = make_rows(0, 25, classes=CLASSES).columns["logits"].copy()
        expected[[3, 17]] = np.nan
        assert np.array_equal(np.load(tmp_path / "predictions.npy"), expected, equal_nan=True)


def test_what_the_manifest_does_not_list_is_deleted(tmp_path: Path) -> None:
    folder = claim(tmp_path)
    (kept,) = write_parts(folder, 8)
    writer_of(folder, "dead").write(make_rows(8, 4))  # written, never committed
    for temporary in (f"{kept.file.replace('/', '/.')}.0123abcd.tmp", ".status.json.0123abcd.tmp"):
        (tmp_path / temporary).touch()
    foreign = {"predictions/notes.txt", "predictions/.part.tmp", ".own.tmp", "logs/access.log"}
    (tmp_path / "logs").mkdir()
    for name in foreign:
        (tmp_path / name).touch()
    claim(tmp_path)
    assert files_below(tmp_path) == {kept.file, "manifest.json", *foreign}


@pytest.mark.parametrize("damage", ["grown", "missing"])
def test_a_damaged_part_is_predicted_again_with_all_after_it(tmp_path: Path, damage: str) -> None:
    parts = write_parts(claim(tmp_path), 4, 8, 20)
    path = tmp_path / parts[1].file
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes() + b"\n")
    folder = claim(tmp_path)
    assert folder.claimed.parts == parts[:1]
    assert files_below(tmp_path / "predictions") == {Path(parts[0].file).name}
    assert Manifest.read(tmp_path) == folder.manifest


def test_other_weights_are_named_but_only_their_digest_tells_them_apart(tmp_path: Path) -> None:
    one, two = {"model.weights": "0123"}, {"model.weights": "4567"}
    write_parts(claim(tmp_path, manifest=wanted(fingerprint=one, weights="IMAGENET1K_V1")), 8)
    with pytest.raises(UsageError, match=r"with model\.weights='IMAGENET1K_V1' there, 'random' here\. Choose"):
        claim(tmp_path, manifest=wanted(fingerprint=two, weights="random"))
    assert claim(tmp_path, manifest=wanted(fingerprint=one, weights="elsewhere.pt")).claimed.prefix == 8


def test_another_job_is_refused_and_its_keys_are_named(tmp_path: Path) -> None:
    write_parts(claim(tmp_path), 8)
    (tmp_path / LOCK).unlink()
    before = {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path)}
    other = wanted(fingerprint={"seed": 7, "data.size": 20}, stop=10)
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
    assert not (tmp_path / LOCK).exists()


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
    assert not (tmp_path / LOCK).exists()


def test_resume_false_refuses_what_is_there(tmp_path: Path) -> None:
    claim(tmp_path / "fresh", resume=False)
    with pytest.raises(UsageError, match=r"output\.dir must be empty with resume=false"):
        claim(tmp_path / "fresh", resume=False)


@pytest.mark.parametrize(("before", "after"), [("parquet", "csv"), ("csv", "npy"), ("npy", "npy"), ("npy", "jsonl")])
def test_overwrite_keeps_the_old_result_until_the_new_one_is_complete(tmp_path: Path, before: str, after: str) -> None:
    old = claim(tmp_path, before)
    write_parts(old, 20)
    old.finish("complete", SAMPLES.path)
    kept = {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path)}
    other = wanted(after, fingerprint={"model.name": "vgg11"}, stop=12)
    new = claim(tmp_path, after, manifest=other, overwrite=True, resume=False)
    assert (new.path, new.claimed.prefix, new.claimed.complete) == (tmp_path / ".next", 0, False)
    write_parts(new, 8, token="u")
    new.publish()
    assert {name: (tmp_path / name).read_bytes() for name in kept} == kept
    # The next attempt of this launch goes on with it.
    again = claim(tmp_path, after, manifest=other)
    assert (again.path, again.claimed.prefix) == (tmp_path / ".next", 8)
    write_parts(again, 12, token="v")
    again.finish("complete", SAMPLES.path)
    again.publish()
    manifest = again.claimed
    assert files_below(tmp_path) == {"manifest.json", "status.json", "errors.jsonl", *(p.file for p in manifest.parts)}
    assert Manifest.read(tmp_path) == manifest
    assert claim(tmp_path, after, manifest=other).claimed.complete


@pytest.mark.parametrize(("requeued", "starts_over"), [("", True), ("5", False), ("6", True)])
def test_overwrite_goes_on_with_what_the_requeued_slurm_job_began(
    tmp_path: Path, requeued: str, starts_over: bool
) -> None:
    claim(tmp_path, manifest=wanted(slurm_job="5"))
    folder = RunFolder.place(tmp_path, overwrite=True, requeued_job=requeued)
    assert folder.starts_over == starts_over
    assert (folder.before is None) == starts_over


def test_a_folder_that_cannot_be_made_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError) as raised:
        claim(tmp_path / "file" / "run")
    assert "\n" not in str(raised.value)


def fail(folder: RunFolder, error: BaseException) -> None:
    with folder:
        raise error


@pytest.mark.parametrize("complete", [False, True])
def test_a_job_that_raises_says_so_unless_its_table_is_complete(tmp_path: Path, complete: bool) -> None:
    folder = claim(tmp_path)
    folder.mark_running()
    write_parts(folder, 20)
    if complete:
        folder.finish("complete", SAMPLES.path)
    else:
        folder.claimed.parts.pop()  # as a failed commit leaves it
    with pytest.raises(ValueError, match="no"):
        fail(folder, ValueError("no"))
    status = status_of(tmp_path)
    assert status["status"] == ("complete" if complete else "failed")
    assert status["reason"] == (None if complete else "ValueError: no")
    assert status["counts"] == {"total": 20, "ok": 18, "error": 2, "missing": 0}


def test_a_folder_that_was_not_claimed_is_not_marked(tmp_path: Path) -> None:
    write_parts(claim(tmp_path), 8)
    with pytest.raises(UsageError):
        fail(RunFolder.place(tmp_path), UsageError("another job"))
    assert not (tmp_path / "status.json").exists()


@pytest.mark.parametrize("how", ["parquet", "npy"])
def test_a_complete_folder_whose_proof_fails_is_complete_no_longer(tmp_path: Path, how: str) -> None:
    folder = claim(tmp_path, how)
    (part, _) = write_parts(folder, 8, 20)
    folder.finish("complete", SAMPLES.path)
    before = (tmp_path / part.file).read_bytes()
    # The last byte of an array is one of the other part.
    place = len(before) // 2 if how == "parquet" else len(before) - 12 * 4 * CLASSES - 1
    flip(tmp_path / part.file, place)
    for _ in range(2):
        again = claim(tmp_path, how)
        with pytest.raises(ProofError, match="has other bytes than were committed"), again:
            again.finish("complete", SAMPLES.path)
        manifest = Manifest.read(tmp_path)
        assert manifest is not None
        assert not manifest.complete
        status = status_of(tmp_path)
        assert status["status"] == "failed"
        assert "has other bytes than were committed" in status["reason"]
    # What the message says to do.
    (tmp_path / part.file).unlink()
    mended = claim(tmp_path, how)
    write_parts(mended, 20, token="u")
    assert mended.finish("complete", SAMPLES.path).missing == 0
    assert status_of(tmp_path)["status"] == "complete"


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["parquet", "csv", "npy"])
def test_a_retry_gives_damaged_rows_no_new_checksum(tmp_path: Path, how: str) -> None:
    folder = claim(tmp_path, how)
    (part, _) = write_parts(folder, 8, 20)
    data = (tmp_path / part.file).read_bytes()
    place = {"npy": len(data) - 12 * 4 * CLASSES - 1, "csv": data.rindex(b"\n0,") + 1 if how == "csv" else 0}
    flip(tmp_path / part.file, place.get(how, len(data) // 2))
    damaged = (tmp_path / part.file).read_bytes()
    again = claim(tmp_path, how)
    table = again.open_table(writer_of(again, "u"), np.array([3]))
    with pytest.raises(ProofError, match="has other bytes than were committed"):
        table.add(make_rows(0, 1, classes=CLASSES))
    assert (tmp_path / part.file).read_bytes() == damaged
    assert again.claimed == Manifest.read(tmp_path)


def test_a_job_ends_when_another_has_claimed_its_folder(tmp_path: Path) -> None:
    """Two are at work in one folder only where somebody deletes the lock."""
    first = claim(tmp_path)
    write_parts(first, 8)
    unlisted = writer_of(first, "t").write(make_rows(8, 4))
    (tmp_path / LOCK).unlink()
    second = claim(tmp_path)
    second.mark_running()
    mine = writer_of(second, "u").write(make_rows(8, 4))
    before = {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path)}

    def list_it() -> None:
        first.open_table(writer_of(first)).list([unlisted])

    def list_more() -> None:
        first.open_table(writer_of(first)).list([mine])

    def finish() -> None:
        first.finish("complete", SAMPLES.path)

    for act in (list_it, list_more, finish, first.mark_running):
        with pytest.raises(StateError, match=r"was claimed by another job.* start it again once") as raised, first:
            act()
        assert len(str(raised.value).splitlines()) == 1
        assert {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path)} == before
    second.open_table(writer_of(second, "u")).list([mine])
    write_parts(second, 20, token="v")
    assert second.finish("complete", SAMPLES.path).missing == 0
    assert status_of(tmp_path)["status"] == "complete"


@pytest.mark.parametrize(("columns", "dtype"), [(CLASSES + 1, "<f4"), (CLASSES, "<f2")])
@pytest.mark.parametrize("stop", [20, 25])
def test_an_array_of_other_columns_is_refused(tmp_path: Path, columns: int, dtype: str, stop: int) -> None:
    write_parts(claim(tmp_path, "npy"), 8)
    np.save(tmp_path / "predictions.npy", np.zeros((20, columns), dtype))
    with pytest.raises(
        UsageError, match=r"has rows of \(\d,\) float\d\d instead of \(3,\) float32\. Delete it and start ag"
    ):
        claim(tmp_path, "npy", manifest=wanted("npy", stop=stop))


def test_what_is_no_array_of_ours_is_predicted_again(tmp_path: Path) -> None:
    write_parts(claim(tmp_path, "npy"), 8)
    np.save(tmp_path / "predictions.npy", np.zeros((20, CLASSES), "<f8"))
    again = claim(tmp_path, "npy")
    assert again.claimed.prefix == 0
    write_parts(again, 20, token="u")
    assert again.finish("complete", SAMPLES.path).missing == 0
