"""Lists, tars and Parquet through one oracle: W ranks equal one rank equals the folder, and a kill costs nothing."""

import json
import os
import shutil
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mgpu_ddp.config.schema import Config, TransformConfig
from mgpu_ddp.distributed.world import World
from tests.support.runs import assert_proved, make_images, read_rows
from tests.support.sources import Source, sources
from tests.support.starting import SMALL_IMAGES, committed_rows, ranks, started, wait_until
from tests.support.worlds import Case, ended, folder, run_world, tiny

COUNT = 47
BLOCKS = (4, 100)
NAMES = ("list", "webdataset", "parquet")
BAD = (5, 20)
SETTINGS = ("output.commit_every=4", "output.dir=out", "runtime.device=cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    paths = make_images(root / "images", COUNT)
    paths[BAD[0]].write_bytes(b"not an image")
    paths[BAD[1]].write_bytes(paths[BAD[1]].read_bytes()[:200])
    return root


@pytest.fixture(scope="module")
def every(root: Path) -> dict[str, Source]:
    """The images in the folder's order, so that its rows are those of every source."""
    images = sorted((root / "images").rglob("*.*"), key=os.fsencode)
    labels = [int(path.parent.name.removeprefix("class")) for path in images]
    return sources(root, images, labels)


def touch_and_remember(path: str, run_dir: Path, world: World) -> None:
    """Make an archive look changed between two jobs."""
    if world.rank == 0:
        os.utime(path)
        shutil.copy(run_dir / "manifest.json", run_dir / "before.json")
    world.exchange("touched", None)


def settings(data: Source, block: int = 1, **changes: Any) -> Config:
    output = {"commit_every": 8, **changes.pop("output", {})}
    return tiny(data=data, loader={"workers": 2, "block": block}, output=output, **changes)


def at_224(data: Any) -> Config:
    """Slow enough to be killed in the middle."""
    return settings(data, 5, transform=TransformConfig(size=224))


def alone(root: Path, every: dict[str, Source]) -> list[Case]:
    images = folder(root / "images")
    cases = [Case(name=name, config=settings(data)) for name, data in every.items()]
    return [Case(name="folder", config=settings(images)), Case(name="folder-224", config=at_224(images)), *cases]


def together(out: Path, root: Path, every: dict[str, Source]) -> list[Case]:
    cases = []
    for name, data in every.items():
        cases += [Case(name=f"{name}-{block}", config=settings(data, block)) for block in BLOCKS]
        cases.append(Case(name=f"{name}-shards", config=settings(data, 4, output={"collect": "shards"})))
    done = out / "webdataset-4"
    return [
        *cases,
        Case(name="touch", call=partial(touch_and_remember, str(root / "shard-01.tar"), done)),
        Case(name="touched", config=settings(every["webdataset"], 7), run_dir=str(done)),
    ]


def disturbed_jobs(out: Path, every: dict[str, Source], killed: Path) -> list[Case]:
    cases = []
    for name, data in every.items():
        stopped = str(out / f"{name}-stopped")
        cases += [
            Case(name=f"{name}-stopped", config=settings(data, 2), stop_at=(0, 6)),
            Case(name=f"{name}-again", config=settings(data, 3), run_dir=stopped),
            Case(name=f"{name}-killed", config=at_224(data), run_dir=str(killed / name / "out")),
        ]
    return cases


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, every: dict[str, Source]) -> Path:
    """A job of each source, killed once it had committed rows."""
    out = tmp_path_factory.mktemp("killed")
    with ExitStack() as stack:
        processes = []
        for name, data in every.items():
            (out / name).mkdir()
            given = {key: value for key, value in asdict(data).items() if key not in ("name", "extensions") and value}
            quoted = [f'data.{key}="{value}"' for key, value in given.items()]
            command = ranks(1, f"data={name}", *quoted, *SMALL_IMAGES, "transform.size=224", *SETTINGS)
            processes.append((stack.enter_context(started(command, out / name)), out / name / "out"))
        while processes:
            # Whichever has come that far first.
            wait_until(lambda: any(committed_rows(run_dir) for _, run_dir in processes), processes[0][0])
            for process, run_dir in list(processes):
                if committed_rows(run_dir):
                    process.kill()
                    processes.remove((process, run_dir))
    return out


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, root: Path, every: dict[str, Source]) -> Path:
    out = tmp_path_factory.mktemp("one")
    run_world(1, alone(root, every), out)
    return out


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, root: Path, every: dict[str, Source]) -> Path:
    out = tmp_path_factory.mktemp("three")
    run_world(3, together(out, root, every), out)
    return out


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory, every: dict[str, Source], killed: Path) -> Path:
    out = tmp_path_factory.mktemp("disturbed")
    run_world(3, disturbed_jobs(out, every, killed), out)
    return out


def what(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without the name that each source gives them in its own way."""
    return [{key: value for key, value in row.items() if key != "path"} for row in rows]


@pytest.mark.timeout(400)
def test_one_rank_equals_the_folder(one: Path) -> None:
    wanted = read_rows(one / "folder")
    names = [row["path"] for row in wanted]
    assert {Path(row["path"]).name for row in wanted if row["error"]} == {f"image {i:04d}.jpg" for i in BAD}
    for name in NAMES:
        assert what(read_rows(one / name)) == what(wanted), name
        assert_proved(one / name, COUNT, errors=len(BAD))
    assert [row["path"] for row in read_rows(one / "list")] == [f"images/{name}" for name in names]
    assert [row["path"] for row in read_rows(one / "parquet")] == [Path(name).name for name in names]
    tars = [f"shard-{i // 16:02}.tar/{Path(name).name}" for i, name in enumerate(names)]
    assert [row["path"] for row in read_rows(one / "webdataset")] == tars


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", NAMES)
def test_three_ranks_equal_one_with_blocks_of_every_size(one: Path, three: Path, name: str) -> None:
    wanted = read_rows(one / name)
    for case in [*(f"{name}-{block}" for block in BLOCKS), f"{name}-shards"]:
        assert ended(three, case, 3)[0]["status"] == "complete", case
        assert read_rows(three / case) == wanted, case


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_job_continues_with_another_block(one: Path, disturbed: Path, name: str) -> None:
    stopped = ended(disturbed, f"{name}-stopped", 3)[0]
    assert stopped["status"] == "preempted"
    assert 0 < stopped["rows"] < COUNT
    assert ended(disturbed, f"{name}-again", 3)[0]["status"] == "complete"
    assert read_rows(disturbed / f"{name}-stopped") == read_rows(one / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_killed_job_continues_on_three_ranks(one: Path, disturbed: Path, killed: Path, name: str) -> None:
    again = ended(disturbed, f"{name}-killed", 3)[0]
    assert again["status"] == "complete"
    assert 0 < again["rows_this_run"] < COUNT, "nothing was left of the killed one, or nothing to do"
    assert what(read_rows(killed / name / "out")) == what(read_rows(one / "folder-224"))


def test_a_touched_archive_is_indexed_anew_and_is_the_same_job(three: Path) -> None:
    assert ended(three, "touched", 3)[0]["status"] == "complete"
    run_dir = three / "webdataset-4"
    before, after = (json.loads((run_dir / name).read_text()) for name in ("before.json", "manifest.json"))
    assert before["parts"] == after["parts"]
