"""Boxes as samples: plain crops, the same rows on any number of ranks, and a kill costs nothing."""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import transforms
from torchvision.models import squeezenet1_1

from mgpu_ddp.config.schema import Config, TransformConfig
from mgpu_ddp.distributed.world import World
from tests.support.boxed import BROKEN, boxed, crop_of, upright
from tests.support.runs import assert_proved, read_rows, read_table
from tests.support.starting import SMALL_IMAGES, committed_rows, ranks, run, started, wait_until
from tests.support.worlds import Case, ended, run_world, tiny

FIELDS = ["topk", "logits", "size"]
SIDE = 56


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("boxes")


@pytest.fixture(scope="module")
def made(root: Path) -> tuple[list[tuple[Path, list[float]]], dict[str, Any]]:
    return boxed(root)


def settings(data: Any, **changes: Any) -> Config:
    output = {"commit_every": 8, "fields": FIELDS, **changes.pop("output", {})}
    return tiny(data=data, transform=TransformConfig(name="imagenet", size=SIDE), output=output, **changes)


def cases(sources: dict[str, Any]) -> list[Case]:
    found = [Case(name=name, config=settings(data)) for name, data in sources.items()]
    found.append(Case(name="block", config=settings(sources["list"], loader={"workers": 2, "block": 3})))
    for how in ("csv", "jsonl"):
        found.append(Case(name=how, config=settings(sources["parquet"], output={"format": how, "fields": ["size"]})))
    npy = {"format": "npy", "fields": ["logits"]}
    found.append(Case(name="npy", config=settings(sources["list"], output=npy)))
    gathered = {"collect": "gather", "commit_every": 5, "fields": ["topk"]}
    return [*found, Case(name="gathered", config=settings(sources["list"], output=gathered))]


@pytest.fixture(scope="module")
def one(root: Path, made: Any) -> Path:
    run_world(1, cases(made[1]), root / "one")
    return root / "one"


def touch(path: Path, world: World) -> None:
    """Make an image look changed between two jobs."""
    if world.rank == 0:
        os.utime(path, (1, 1))
    world.exchange("touched", None)


@pytest.fixture(scope="module")
def three(root: Path, made: Any, one: Path) -> Path:
    out, data = root / "three", made[1]["list"]
    shutil.copytree(one / "list", out / "retried")
    shutil.copytree(one / "gathered", out / "touched")
    stopped, retried = str(out / "stopped"), settings(data, retry_failed=True)
    run_world(
        3,
        [
            *cases(made[1]),
            Case(name="stopped", config=settings(data), stop_at=(0, 4)),
            Case(name="again", config=settings(data), run_dir=stopped),
            Case(name="retried", config=retried),
            Case(name="touch", call=partial(touch, root / "02.img")),
            Case(name="touched", config=cases(made[1])[-1].config),
        ],
        out,
    )
    return out


@pytest.mark.timeout(400)
def test_rows_are_those_of_plain_crops(one: Path, made: Any) -> None:
    steps = [transforms.Resize(64), transforms.CenterCrop(SIDE), transforms.ToTensor()]
    transform = transforms.Compose([*steps, transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    torch.manual_seed(0)
    module = squeezenet1_1(num_classes=12).eval()
    rows, boxes = read_rows(one / "list"), made[0]
    assert len(rows) == len(boxes)
    counts = {"crops": 0, "errors": 0}
    for row, (path, box) in zip(rows, boxes, strict=True):
        assert row["path"] == path.name
        assert np.array_equal(row["box"], box, equal_nan=True)
        if int(path.stem) in BROKEN:
            assert "UnidentifiedImageError" in row["error"]
            assert (row["width"], row["height"], row["logits"]) == (None, None, None)
            counts["errors"] += 1
            continue
        assert (row["width"], row["height"]) == upright(path).size
        crop = crop_of(path, box)
        if crop is None:
            assert row["error"].startswith("ValueError: the box [")
            counts["errors"] += 1
            continue
        assert row["error"] is None, row
        with torch.inference_mode():
            wanted = module(transform(crop)[None])[0]
        assert np.allclose(row["logits"], wanted, atol=1e-5)
        counts["crops"] += 1
    assert counts == {"crops": 42, "errors": 13}
    assert_proved(one / "list", 55, errors=13)


def without_names(rows: list[dict[str, Any]]) -> str:
    return json.dumps([{key: value for key, value in row.items() if key != "path"} for row in rows])


def test_parquet_has_the_rows_of_the_list(one: Path) -> None:
    assert without_names(read_rows(one / "parquet")) == without_names(read_rows(one / "list"))
    assert str(read_table(one / "list").schema.field("box").type) == "fixed_size_list<element: double>[4]"


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", ["list", "parquet", "block", "csv", "jsonl", "gathered"])
def test_three_ranks_have_the_rows_of_one(one: Path, three: Path, name: str) -> None:
    assert ended(three, name, 3)[0]["status"] == "complete"
    assert json.dumps(read_rows(three / name)) == json.dumps(read_rows(one / name))


def test_an_array_has_the_numbers_of_the_table(one: Path, three: Path) -> None:
    wanted = [row["logits"] or [np.nan] * 12 for row in read_rows(one / "list")]
    for out in (one, three):
        found = np.load(out / "npy" / "predictions.npy")
        assert np.array_equal(found, np.array(wanted, np.float32), equal_nan=True)


def test_texts_have_the_boxes_of_the_table(one: Path) -> None:
    for how in ("csv", "jsonl"):
        for row, wanted in zip(read_rows(one / how), read_rows(one / "list"), strict=True):
            box = json.loads(row["box"]) if how == "csv" else row["box"]
            assert [np.nan if value is None else value for value in box] == pytest.approx(wanted["box"], nan_ok=True)
            assert (str(row["width"] or ""), str(row["height"] or "")) == (
                str(wanted["width"] or ""),
                str(wanted["height"] or ""),
            )


def test_what_is_left_out_and_clipped_is_counted(one: Path, three: Path) -> None:
    for out, size in ((one, 1), (three, 3)):
        summary = ended(out, "list", size)[0]
        assert summary["left_out"] == {"without boxes": 2}
        assert summary["clipped"] == 10


def test_a_stopped_job_continues(one: Path, three: Path) -> None:
    assert ended(three, "stopped", 3)[0]["status"] == "preempted"
    assert ended(three, "again", 3)[0]["status"] == "complete"
    assert json.dumps(read_rows(three / "stopped")) == json.dumps(read_rows(one / "list"))


def test_error_rows_are_tried_again(one: Path, three: Path) -> None:
    assert ended(three, "retried", 3)[0]["rows_this_run"] == 13
    assert json.dumps(read_rows(three / "retried")) == json.dumps(read_rows(one / "list"))


def test_all_boxes_of_a_changed_image_are_predicted_again(one: Path, three: Path, made: Any) -> None:
    summary = ended(three, "touched", 3)[0]
    assert summary["changed"] == summary["rows_this_run"] == sum(path.name == "02.img" for path, _ in made[0]) > 1
    assert json.dumps(read_rows(three / "touched")) == json.dumps(read_rows(one / "gathered"))


@pytest.mark.timeout(400)
def test_a_killed_job_continues_on_three_ranks(tmp_path: Path) -> None:
    boxes, _ = boxed(tmp_path, repeat=6)
    words = (f"data.path={tmp_path}/boxes.csv", "data.box_column=boxes", "output.fields=[topk,size]", *SMALL_IMAGES)
    words = ("data=list", *words, "transform.size=112", "output.dir=out", "runtime.device=cpu")
    # Boxes come in blocks of 256 otherwise, and windows in blocks.
    words += ("output.commit_every=4", "loader.block=4", "batch_size=4")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir()
    whole.mkdir()
    with started(ranks(1, *words), killed) as process:
        wait_until(lambda: committed_rows(killed / "out") > 0, process)
        process.kill()
        process.wait(20)
    assert committed_rows(killed / "out") < len(boxes)
    for size, cwd in ((3, killed), (1, whole)):
        ended_well = run(ranks(size, *words), cwd)
        assert ended_well.code == 0, ended_well.err
    assert_proved(killed / "out", len(boxes), errors=6 * 13)
    assert json.dumps(read_rows(killed / "out")) == json.dumps(read_rows(whole / "out"))
