"""Images that are replaced in place are predicted again, and those alone; the table ends as that of a fresh run."""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mgpu_ddp.config.schema import Config, FolderConfig, ListConfig, WebDatasetConfig
from mgpu_ddp.distributed.world import World
from tests.support.runs import assert_proved, make_images, read_rows
from tests.support.sources import write_tar
from tests.support.worlds import Case, ended, run_world, tiny

COUNT = 30
REPLACED = (0, 7, 29)
BROKEN = 11
FORMATS = ("parquet", "npy")
PREDICTED_AGAIN = ("stat-parquet", "stat-npy", "hash-parquet", "list-parquet")
IN_TAR = 10

pytestmark = pytest.mark.timeout(400)


def replace_images(root: str, world: World) -> None:
    """Replace some images, break one, and touch one without changing it."""
    if world.rank == 0:
        images = paths(Path(root))
        others = make_images(Path(root).parent / "others", COUNT, seed=1)
        for number in REPLACED:
            shutil.copy(others[number], images[number])
        images[BROKEN].write_bytes(b"no image any more")
        pack(images[-IN_TAR:], Path(root).parent / "1.tar")
    world.exchange("replaced", None)


def pack(images: list[Path], tar: Path) -> None:
    write_tar(tar, images, [None] * len(images))


def touch_image(root: str, world: World) -> None:
    if world.rank == 0:
        os.utime(paths(Path(root))[3])
    world.exchange("touched", None)


def paths(root: Path) -> list[Path]:
    return sorted(root.rglob("*.*"), key=os.fsencode)


def job(data: Any, how: str = "parquet", **changes: Any) -> Config:
    return tiny(data=data, output={"commit_every": 6, "format": how}, **changes)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("changed")
    make_images(out / "photos", COUNT)
    root = str(out / "photos")
    pack(paths(out / "photos")[:-IN_TAR], out / "0.tar")
    pack(paths(out / "photos")[-IN_TAR:], out / "1.tar")
    (out / "list.txt").write_text("".join(f"{path}\n" for path in paths(out / "photos")))
    folder = partial(FolderConfig, root=root)
    data = {
        "stat": folder(),
        "hash": folder(check="hash"),
        "name": folder(check="name"),
        "list": ListConfig(path=str(out / "list.txt")),
    }
    jobs = {
        name: job(data[name.partition("-")[0]], name.partition("-")[2]) for name in (*PREDICTED_AGAIN, "name-parquet")
    }
    tars = job(WebDatasetConfig(urls=f"{out}/*.tar", check="stat"))
    jobs |= {"tars": tars, "shard": job(folder(), shard="0/2")}
    stopped = job(folder(), max_errors=0)
    cases = [
        *(Case(name=name, config=config) for name, config in jobs.items()),
        Case(name="stopped", config=job(folder())),
        Case(name="replace", call=partial(replace_images, root)),
        # What is broken is one error too many: the rows that were not predicted again yet must not look like new ones.
        Case(name="too many", config=stopped, run_dir=str(out / "stopped")),
        Case(name="resumed", config=job(folder()), run_dir=str(out / "stopped")),
        *(Case(name=f"{name}-again", config=config, run_dir=str(out / name)) for name, config in jobs.items()),
        *(Case(name=f"fresh-{how}", config=job(folder(), how)) for how in FORMATS),
        Case(name="fresh-tars", config=tars),
        Case(name="touch", call=partial(touch_image, root)),
        *(
            Case(name=f"{name}-touched", config=jobs[f"{name}-parquet"], run_dir=str(out / f"{name}-parquet"))
            for name in ("stat", "hash")
        ),
    ]
    run_world(2, cases, out)
    return out


def rows_of(run_dir: Path, how: str) -> list[Any]:
    if how == "npy":
        return list(np.nan_to_num(np.load(run_dir / "predictions.npy"), nan=-1).tolist())
    return [{key: value for key, value in row.items() if key != "path"} for row in read_rows(run_dir)]


@pytest.mark.parametrize("name", PREDICTED_AGAIN)
def test_changed_images_and_no_others_are_predicted_again(out: Path, name: str) -> None:
    again, how = ended(out, f"{name}-again", 2)[0], name.partition("-")[2]
    assert (again["status"], again["changed"]) == ("complete", len(REPLACED) + 1)
    assert again["rows_this_run"] == len(REPLACED) + 1
    assert_proved(out / name, COUNT, errors=1)
    wanted, rows = rows_of(out / f"fresh-{how}", how), rows_of(out / name, how)
    if name == "list-parquet":
        wanted, rows = ([{k: v for k, v in row.items() if k != "label"} for row in each] for each in (wanted, rows))
    assert rows == wanted


def test_the_rows_of_a_changed_tar_are_predicted_again(out: Path) -> None:
    assert ended(out, "tars-again", 2)[0]["changed"] == IN_TAR
    assert rows_of(out / "tars", "parquet") == rows_of(out / "fresh-tars", "parquet")


def test_a_shard_looks_at_its_own_images(out: Path) -> None:
    assert ended(out, "shard-again", 2)[0]["changed"] == sum(number < COUNT // 2 for number in (*REPLACED, BROKEN))
    assert rows_of(out / "shard", "parquet") == rows_of(out / "fresh-parquet", "parquet")[: COUNT // 2]


def test_names_alone_find_no_change(out: Path) -> None:
    again = ended(out, "name-parquet-again", 2)[0]
    assert (again["changed"], again.get("rows_this_run", 0)) == (0, 0)


def test_a_touched_image_has_changed_by_stat_and_not_by_hash(out: Path) -> None:
    assert ended(out, "stat-touched", 2)[0]["changed"] == 1
    assert ended(out, "hash-touched", 2)[0]["changed"] == 0


def test_a_job_that_ends_before_all_are_predicted_again_remembers_them(out: Path) -> None:
    stopped, resumed = ended(out, "too many", 2)[0], ended(out, "resumed", 2)[0]
    assert (stopped["status"], stopped["exit_code"]) == ("failed", 3)
    assert resumed["status"] == "complete"
    assert rows_of(out / "stopped", "parquet") == rows_of(out / "fresh-parquet", "parquet")
    assert not json.loads((out / "stopped" / "manifest.json").read_text())["changed"]
