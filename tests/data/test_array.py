"""Images in one array: the same pixels as one by one, whatever the layout, and nothing but an array of images."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mgpu_ddp.config.schema import ArrayConfig, Config, LoaderConfig, ModelConfig, TransformConfig
from mgpu_ddp.data.array import ArraySamples, identity, open_array
from mgpu_ddp.errors import StateError, UsageError
from mgpu_ddp.loader.batch import as_batch
from mgpu_ddp.loader.shared_slots import SharedSlots
from mgpu_ddp.loader.worker import BatchMaker, Order
from mgpu_ddp.models.build import build_model
from mgpu_ddp.models.input_transform import choose_transform
from mgpu_ddp.preprocess.transform import MEAN, Transform, imagenet, plain
from tests.support.samples import ignore_time


def images(*shape: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def saved(path: Path, array: Any) -> ArrayConfig:
    np.save(path, array)
    return ArrayConfig(path=str(path))


TRANSFORMS = [
    plain(16),
    imagenet(16),
    Transform(resize=(18,), crop=16),
    Transform(resize=(18, 20), crop=13),
    Transform(resize=(18, 20)),
]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("indices", [[0, 1, 2], [1, 4, 7], [3], [0, 1, 3], [2, 1, 0]])
@pytest.mark.parametrize("first", [False, True], ids=["channels last", "channels first"])
def test_a_batch_equals_its_images_one_by_one(
    tmp_path: Path, transform: Transform, indices: list[int], first: bool
) -> None:
    array = images(9, 18, 20, 3)
    samples = ArraySamples(saved(tmp_path / "x.npy", array.transpose(0, 3, 1, 2) if first else array))
    slots = SharedSlots(1, 4, transform.shape)
    slots.pixels(0)[:] = 99
    worker = BatchMaker(samples, transform, slots, LoaderConfig())
    batch = as_batch(worker.make(Order(slot=0, indices=indices)), slots)
    for place, index in enumerate(indices):
        pixels, label = samples.load(index, transform, ignore_time)
        assert np.array_equal(batch.pixels[place].numpy(), pixels)
        assert label == batch.label[place] == -1
    assert not batch.pixels[len(indices) :].any()
    assert batch.errors == {}
    assert torch.is_tensor(batch.pixels)


def test_what_needs_no_resizing_is_copied_at_once(tmp_path: Path) -> None:
    samples = ArraySamples(saved(tmp_path / "x.npy", images(9, 18, 20, 3)))
    pixels = np.zeros((4, 16, 16, 3), np.uint8)
    assert samples.fill([2, 5, 8], Transform(resize=(18,), crop=16), pixels, ignore_time)
    assert np.array_equal(pixels[:3], images(9, 18, 20, 3)[2:9:3, 1:17, 2:18])
    assert not samples.fill([2, 5, 8], plain(16), pixels, ignore_time)


@pytest.mark.parametrize("indices", [[0, 1, 2], [1, 4, 7], [8]])
@pytest.mark.parametrize("first", [False, True], ids=["channels last", "channels first"])
def test_whole_images_are_read_to_where_they_belong(tmp_path: Path, indices: list[int], first: bool) -> None:
    array = images(9, 18, 20, 3)
    samples = ArraySamples(saved(tmp_path / "x.npy", array.transpose(0, 3, 1, 2) if first else array))
    slots = SharedSlots(1, 4, (18, 20, 3), planar=first)
    worker = BatchMaker(samples, imagenet(16).without_geometry((18, 20)), slots, LoaderConfig())
    assert samples._read(range(3), slots.array(0)[:3])
    assert np.array_equal(slots.array(0)[:3], array[:3])
    batch = as_batch(worker.make(Order(slot=0, indices=indices)), slots, raw=True)
    assert np.array_equal(batch.pixels[: len(indices)].numpy(), array[indices])


@pytest.mark.parametrize("change", ["cut short", "replaced", "written to"])
def test_an_array_that_changes_ends_the_job_in_one_line(tmp_path: Path, change: str) -> None:
    config = saved(tmp_path / "x.npy", images(9, 18, 20, 3))
    samples, transform = ArraySamples(config), Transform(resize=(18, 20))
    worker, order = (
        BatchMaker(samples, transform, SharedSlots(1, 4, (18, 20, 3)), LoaderConfig()),
        Order(slot=0, indices=[4, 5]),
    )
    worker.make(order)
    if change == "cut short":
        os.truncate(config.path, 128 + 5 * 18 * 20 * 3 + 7)
    elif change == "replaced":
        np.save(tmp_path / "y.npy", images(9, 18, 20, 3))
        os.replace(tmp_path / "y.npy", config.path)
    else:
        os.utime(config.path, ns=(0, 0))
    said = f"{config.path} (data.path) was changed while the job read it. Restore it and start again."
    with pytest.raises(StateError, match=re.escape(said)):
        worker.make(order)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), "float32 (2, 8, 8, 3)"),
        (np.zeros((2, 8, 8), np.uint8), "uint8 (2, 8, 8)"),
        (np.zeros((2, 8, 8, 4), np.uint8), "uint8 (2, 8, 8, 4)"),
        (np.zeros((2, 0, 8, 3), np.uint8), "at least one pixel"),
        (np.array([{}], dtype=object), "Array can't be memory-mapped"),
    ],
)
def test_anything_else_is_refused_in_one_line(tmp_path: Path, array: Any, said: str) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(UsageError) as raised:
        open_array(str(tmp_path / "x.npy"))
    assert str(raised.value).startswith("data.path")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


HEADERS = {
    "negative": "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 8, 8, 3)}",
    "absurd": f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({10**30}, 8, 8, 3)}}",
    "booleans": "{'descr': '|u1', 'fortran_order': False, 'shape': (True, True, True, 3)}",
    "torn": "(" * 5000,
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_lying_header_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    header = HEADERS[kind].encode() + b"\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(192)
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(UsageError, match=r"^data\.path='.*x\.npy' cannot be read as a \.npy \(") as raised:
        open_array(str(tmp_path / "x.npy"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["x.npz", "renamed.npy", "torn.npy", "missing.npy", "empty.npy", "text.npy"])
def test_a_file_that_is_no_array_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    np.savez(tmp_path / "x.npz", images(2, 8, 8, 3))
    shutil.copy(tmp_path / "x.npz", tmp_path / "renamed.npy")
    (tmp_path / "torn.npy").write_bytes((tmp_path / "x.npz").read_bytes()[:200])
    (tmp_path / "empty.npy").touch()
    (tmp_path / "text.npy").write_text("not an array")
    with pytest.raises(UsageError, match=r"data\.path") as raised:
        open_array(str(tmp_path / name))
    assert "\n" not in str(raised.value)


def test_another_array_under_the_same_name_is_another_job(tmp_path: Path) -> None:
    config = saved(tmp_path / "x.npy", images(2, 8, 8, 3))
    before = identity(config)
    assert identity(config) == before
    saved(tmp_path / "x.npy", images(3, 8, 8, 3))
    assert identity(config) != before


@pytest.mark.parametrize(("side", "resize"), [(224, (224, 224)), (256, (256,))])
def test_images_of_the_models_size_are_only_normalised(tmp_path: Path, side: int, resize: tuple[int, ...]) -> None:
    data = saved(tmp_path / "x.npy", images(1, side, side, 3))
    config = Config(data=data, transform=TransformConfig(), model=ModelConfig(name="squeezenet1_1", weights=None))
    transform = choose_transform(config, build_model(config))
    assert transform.resize == resize
    assert transform.mean == MEAN
    assert transform.cut(side, side) is not None
