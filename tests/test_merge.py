"""Shards → one run folder, and what is refused: each shard is a real job."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mgpu_ddp import report
from mgpu_ddp.data.listing import FILE_NAME, Listing
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import ProofError, UsageError
from mgpu_ddp.merge import Shard, _identity, main, merge
from mgpu_ddp.output.manifest import Manifest
from mgpu_ddp.report import rebuild
from mgpu_ddp.version import version_text
from tests.support.runs import assert_proved, make_images, read_rows
from tests.support.sources import index_tars, tar_of
from tests.support.worlds import folder, run_job, tiny

OTHER = Listing.build([b"other.jpg"])
KINDS: dict[str, dict[str, Any]] = {
    "parquet": {},
    "csv": {"output": {"format": "csv"}},
    "npy": {"output": {"format": "npy"}},
}


def run(world: World, run_dir: Path, **changes: Any) -> None:
    run_job(tiny(**changes), run_dir, world)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, world: World) -> Path:
    """Three shards of a folder of images with a broken one, in each format, and the whole job beside them."""
    root = tmp_path_factory.mktemp("shards")
    make_images(root / "images", 31)[7].write_bytes(b"no image")
    for kind, changes in KINDS.items():
        for number in range(3):
            run(world, root / kind / f"shard-{number}", data=folder(root / "images"), shard=f"{number}/3", **changes)
        run(world, root / f"whole-{kind}", data=folder(root / "images"), **changes)
    return root


@pytest.fixture
def three(shards: Path, tmp_path: Path) -> Path:
    """A copy of the Parquet shards to spoil."""
    shutil.copytree(shards / "parquet", tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_merged_is_the_whole_job(shards: Path, kind: str, tmp_path: Path, world: World) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(shards / kind, run_dir)
    summary = merge(run_dir)
    assert (summary["rows"], summary["errors"], summary["shards"], summary["weights"]) == (31, 1, 3, "random")
    assert_proved(run_dir, 31, errors=1)
    whole = shards / f"whole-{kind}"
    assert (run_dir / "errors.jsonl").read_bytes() == (whole / "errors.jsonl").read_bytes()
    if kind == "npy":
        assert np.load(run_dir / "predictions.npy").tobytes() == np.load(whole / "predictions.npy").tobytes()
    else:
        assert read_rows(run_dir) == read_rows(whole)
    page = (run_dir / "report.html").read_bytes()
    (run_dir / "report.html").unlink()
    rebuild(run_dir)
    assert (run_dir / "report.html").read_bytes() == page
    assert "31 of 31" in (run_dir / "report.html").read_text()
    before = (run_dir / "manifest.json").read_bytes()
    run(world, run_dir, data=folder(shards / "images"), **KINDS[kind])
    assert json.loads(before)["parts"] == json.loads((run_dir / "manifest.json").read_text())["parts"], "nothing to do"
    assert merge(run_dir)["rows"] == 31, "again"


@pytest.mark.parametrize("kind", ["parquet", "npy"])
def test_errors_are_those_of_the_proved_rows(shards: Path, kind: str, tmp_path: Path) -> None:
    """`errors.jsonl` of a shard has no checksum."""
    run_dir = tmp_path / "run"
    shutil.copytree(shards / kind, run_dir)
    for path in run_dir.glob("*/errors.jsonl"):
        path.write_bytes(b"{")
    merge(run_dir)
    assert (run_dir / "errors.jsonl").read_bytes() == (shards / f"whole-{kind}" / "errors.jsonl").read_bytes()


def spoil(change: Callable[[Manifest], None]) -> Callable[[Path], None]:
    def act(run_dir: Path) -> None:
        manifest = Manifest.read(run_dir / "shard-1")
        assert manifest is not None
        change(manifest)
        manifest.write(run_dir / "shard-1")

    return act


def unfinish(manifest: Manifest) -> None:
    manifest.complete, manifest.parts = False, []


def move(manifest: Manifest) -> None:
    """As if there had been one sample more before."""
    manifest.start, manifest.stop = manifest.start + 1, manifest.stop + 1
    (part,) = manifest.parts
    first = part.first + 1
    manifest.parts = [replace(part, first=first, file=f"predictions/part-{first:012d}-0{part.file[-14:]}")]


def renumber(manifest: Manifest) -> None:
    manifest.shard = "1/4"


def other_model(manifest: Manifest) -> None:
    manifest.fingerprint["model.name"] = "resnet50"


@pytest.mark.parametrize(
    ("act", "line"),
    [
        (
            lambda d: shutil.rmtree(d / "shard-1"),
            "lacks 1 of its 3 shards. Run shard=1/3.",
        ),
        (
            lambda d: shutil.copytree(d / "shard-1", d / "copy"),
            "shard 1/3 is there twice, in copy and shard-1. Move one of them away.",
        ),
        (lambda d: [shutil.rmtree(p) for p in d.iterdir()], "has no shards below it. Start them with"),
        (
            spoil(unfinish),
            "shard-1 is not complete: 10 of its 10 rows are left. Start it again",
        ),
        (spoil(renumber), "shard-1 is shard 1/4, but shard-0 is 0/3."),
        (
            spoil(other_model),
            "shards of different jobs: model.name='resnet50' in shard-1, 'squeezenet1_1' in",
        ),
        (spoil(move), "shard-0 ends at row 10 and shard-1 begins at row 11"),
        (lambda d: (d / "shard-2" / "listing.arrow").write_bytes(OTHER.buffer), "listing.arrow="),
        (lambda d: (d / "shard-2" / "listing.arrow").write_bytes(b""), "listing.arrow cannot be read ("),
        (lambda d: (d / "shard-2" / "manifest.json").write_text("{"), "is not a manifest that can be read"),
    ],
)
def test_what_is_not_one_whole_job_is_refused(three: Path, act: Callable[[Path], None], line: str) -> None:
    act(three)
    with pytest.raises(UsageError) as refused:
        merge(three)
    assert line in str(refused.value)
    assert not (three / "manifest.json").exists()


def foreign(name: str) -> Callable[[Path], None]:
    def act(run_dir: Path) -> None:
        (run_dir / name).parent.mkdir(exist_ok=True)
        (run_dir / name).write_text("precious")

    return act


def other_job(run_dir: Path) -> None:
    shutil.copytree(run_dir / "shard-0", run_dir, dirs_exist_ok=True)
    manifest = Manifest.read(run_dir)
    assert manifest is not None
    other_model(manifest)
    manifest.write(run_dir)


def linked(name: str) -> Callable[[Path], None]:
    """A name of ours, in the folder itself or a shard, as a link to what it was or to a file elsewhere."""

    def act(run_dir: Path) -> None:
        victim = run_dir.parent / "victim"
        if (run_dir / name).exists():
            (run_dir / name).rename(victim)
        else:
            victim.write_text("precious")
        (run_dir / name).symlink_to(victim)

    return act


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("act", "line"),
    [
        *(
            (foreign(name), f"with foreign {Path(name).name}")
            for name in ("classes.json", "errors.jsonl", "status.json")
        ),
        (foreign("predictions/thesis.csv"), "'predictions/thesis.csv' is not of a job"),
        (foreign("predictions/notes.txt"), "with foreign predictions"),
        (foreign(".lock"), "must not hold a foreign .lock"),
        (other_job, "holds another job than its shards"),
        (linked("predictions"), "'predictions' is not a folder"),
        *((linked(name), f"'{name}' is not a regular file") for name in (".lock", "manifest.json", "report.html")),
        (linked("shard-1/manifest.json"), "'manifest.json' is not a regular file"),
        (linked("shard-1/listing.arrow"), "'listing.arrow' is not a regular file"),
        (linked("shard-1/predictions"), "'predictions' is not a folder"),
        (lambda d: os.mkfifo(d / "shard-1" / "predictions.npy"), "'predictions.npy' is not a regular file"),
    ],
)
def test_a_merge_leaves_alone_what_is_not_its_own(three: Path, act: Callable[[Path], None], line: str) -> None:
    act(three)
    before = {path: path.read_bytes() for path in three.parent.rglob("*") if path.is_file()}
    with pytest.raises(UsageError) as refused:
        merge(three)
    assert line in str(refused.value)
    assert {path: path.read_bytes() for path in three.parent.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("damage", ["parts", "all"])
def test_a_merge_that_was_cut_short_can_be_repeated(three: Path, damage: str) -> None:
    merge(three)
    manifest = Manifest.read(three)
    assert manifest is not None
    replace(manifest, parts=[], complete=False).write(three)
    for path in (three / "predictions").iterdir() if damage == "parts" else [three / "metrics.json"]:
        path.unlink()
    (three / "notes.txt").write_text("precious")
    assert merge(three)["rows"] == 31
    assert_proved(three, 31, errors=1)
    assert (three / "notes.txt").read_text() == "precious"


def test_a_part_that_is_not_what_was_committed_is_found(three: Path) -> None:
    part = next((three / "shard-1" / "predictions").iterdir())
    content = bytearray(part.read_bytes())
    content[50] ^= 1
    part.write_bytes(content)
    with pytest.raises(ProofError, match="has other bytes than were committed"):
        merge(three)
    assert not (three / "manifest.json").exists()


def test_shards_of_a_job_may_have_seen_their_tars_touched(tmp_path: Path, world: World) -> None:
    tar_of(tmp_path / "x.tar", {"a.jpg": b"1", "b.jpg": b"2"})
    identities = []
    for number, content in enumerate((b"1", b"1", b"one")):
        folder = tmp_path / str(number)
        folder.mkdir()
        tar_of(tmp_path / "x.tar", {"a.jpg": content, f"{'c' if number == 2 else 'b'}.jpg": b"2"})
        os.utime(tmp_path / "x.tar", ns=(number, number))
        (folder / FILE_NAME).write_bytes(index_tars(tmp_path / "x.tar", world).buffer)
        manifest = Manifest(fingerprint={}, start=0, stop=2, batch_size=1)
        identities.append(_identity(Shard(folder=folder, manifest=manifest, number=number, count=3)))
    assert identities[0] == identities[1] != identities[2]


@pytest.mark.parametrize("argv", [[], ["run="], ["run=nowhere"], ["dir=x"], ["run=.", "run=."]])
def test_the_command_line_is_one_key(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["merge", *argv])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("mgpu_ddp: run must be ")


@pytest.mark.parametrize(("name", "main"), [("merge", main), ("report", report.main)])
def test_a_command_says_what_it_is_for_and_what_it_is_made_with(
    name: str, main: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag, said in {"--help": f"  python -m mgpu_ddp.{name} run=DIR\n", "--version": version_text()}.items():
        monkeypatch.setattr("sys.argv", [name, flag])
        main()
        assert said in capsys.readouterr().out
