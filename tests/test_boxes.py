"""`mgpu_ddp.boxes_to_source` against torchvision's own mapping of boxes, in the other direction."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as v2

import mgpu_ddp
from mgpu_ddp.data.boxes import window_of
from mgpu_ddp.errors import UsageError
from mgpu_ddp.preprocess.transform import Transform, imagenet, plain
from tests.support.run_folders import claim, wanted

TRANSFORMS = {
    "imagenet": imagenet(224),
    "plain": plain(320),
    "shorter side": Transform(resize=(640,), crop=640),
    "both sides, then a crop": Transform(resize=(300, 403), crop=(251, 300)),
    "wide crop": Transform(resize=(229,), crop=(100, 223)),
}
SIZES = [(500, 375), (375, 500), (97, 101), (1333, 801), (640, 640)]


def run_of(folder: Path, transform: Transform) -> Path:
    job = {f"transform.{name}": value for name, value in transform.described().items()}
    columns = [{"name": "boxes", "dtype": "float32", "shape": [4], "ragged": True}]
    claim(
        folder, "parquet", manifest=wanted("parquet", fingerprint={"model.num_classes": None, **job}, columns=columns)
    )
    return folder


def forward(box: np.ndarray, width: int, height: int, transform: Transform) -> list[float]:
    """A box in pixels of the model's input, by torchvision."""
    resized = v2.resize(
        tv_tensors.BoundingBoxes(torch.tensor(box[None]), format="XYXY", canvas_size=(height, width)),  # type: ignore[call-overload]
        list(transform.resize),
    )
    if transform.crop is not None:
        resized = v2.center_crop(resized, list(transform.out_size))
    found: list[float] = resized[0].tolist()
    return found


def inner(random: Any, width: int, height: int) -> np.ndarray:
    """A box near the middle, which no crop cuts."""
    low, high = random.uniform(0.4, 0.48, 2), random.uniform(0.52, 0.6, 2)
    return np.concatenate([low, high]) * [width, height, width, height]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_boxes_come_back_to_where_they_were(tmp_path: Path, name: str) -> None:
    transform, random = TRANSFORMS[name], np.random.default_rng(0)
    source = [[inner(random, *size) for _ in range(number)] for number, size in enumerate(SIZES)]
    found = [[forward(box, *size, transform) for box in boxes] for boxes, size in zip(source, SIZES, strict=True)]
    widths, heights = zip(*SIZES, strict=True)
    kind = pa.list_(pa.list_(pa.float64(), 4))
    table = pa.table(
        {
            "path": ["a", "b", "c", "d", "e", "broken"],
            "boxes": pa.array([*found, None], kind),
            "width": pa.array([*widths, None], pa.int32()),
            "height": pa.array([*heights, None], pa.int32()),
        }
    )
    back = mgpu_ddp.boxes_to_source(run_of(tmp_path / "run", transform), table)
    assert back.column_names == table.column_names
    *rows, last = back["boxes"].to_pylist()
    assert last is None
    for mine, boxes in zip(rows, source, strict=True):
        assert len(mine) == len(boxes)
        assert np.allclose(np.reshape(mine, (-1, 4)), np.reshape(boxes, (-1, 4)), atol=1e-9)


def test_boxes_found_in_crops_come_back_to_the_image(tmp_path: Path) -> None:
    transform, random = imagenet(224), np.random.default_rng(1)
    crops = [[10.0, 20.5, 210.5, 331.0], [-30.0, 4.0, 90.0, 9e9], [0.0, 0.0, 300.0, 200.0]]
    width, height, source, found = 300, 200, [], []
    for crop in crops:
        (left, top, right, bottom), _ = window_of(crop, width, height)
        inside = inner(random, right - left, bottom - top)
        found.append([forward(inside, right - left, bottom - top, transform)])
        source.append(inside + np.array([left, top, left, top]))
    table = pa.table(
        {
            "things": pa.array([*found, None], pa.list_(pa.list_(pa.float64(), 4))),
            "box": pa.array([*crops, None], pa.list_(pa.float64(), 4)),
            "width": pa.array([width] * 4, pa.int32()),
            "height": pa.array([height] * 4, pa.int32()),
        }
    )
    back = mgpu_ddp.boxes_to_source(mgpu_ddp.open(run_of(tmp_path / "run", transform)), table, column="things")
    assert np.allclose([boxes[0] for boxes in back["things"].to_pylist()[:-1]], source, atol=1e-9)


def test_what_lacks_is_told_in_one_line(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", imagenet(224))
    size = {"width": pa.array([1], pa.int32()), "height": pa.array([1], pa.int32())}
    with pytest.raises(UsageError, match=r"table must be one with a column boxes, got .* Give column=NAME"):
        mgpu_ddp.boxes_to_source(run, pa.table(size))
    with pytest.raises(UsageError, match=r"table must be one with a column width, got .* output.fields=\[size\]"):
        mgpu_ddp.boxes_to_source(run, pa.table({"boxes": [[[0.0] * 4]]}))
    with pytest.raises(UsageError, match="column must be a column of lists of four numbers each, got 'boxes' of list<"):
        mgpu_ddp.boxes_to_source(run, pa.table({"boxes": [[[0.0] * 3]], **size}))
    own = tmp_path / "own"
    claim(own, "parquet", manifest=wanted("parquet", fingerprint={"transform.name": "script"}, columns=[
        {"name": "boxes", "dtype": "float32", "shape": [4], "ragged": True}
    ]))  # fmt: skip
    with pytest.raises(UsageError, match="run must be that of a job whose transform resizes and crops, got"):
        mgpu_ddp.boxes_to_source(own, pa.table({"boxes": [[[0.0] * 4]], **size}))
    with pytest.raises(UsageError, match="folder must be a run folder"):
        mgpu_ddp.boxes_to_source(tmp_path)


def test_texts_that_were_carried_are_no_detections(tmp_path: Path) -> None:
    table = pa.table({"boxes": ["[[0,0,9,9]]"], "width": [9], "height": [9]})
    with pytest.raises(
        UsageError, match=r"^column must be a column of lists of four numbers each, got 'boxes' of string"
    ):
        mgpu_ddp.boxes_to_source(run_of(tmp_path / "run", imagenet(224)), table)
