"""Boxes in the loader: each image is read, decoded or packed once for the boxes that follow each other."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mgpu_ddp.config.schema import LoaderConfig, OutputConfig
from mgpu_ddp.data import encoded
from mgpu_ddp.data.datasets import find_listing, open_samples
from mgpu_ddp.data.encoded import EncodedSamples
from mgpu_ddp.data.samples import ChosenSamples
from mgpu_ddp.distributed.world import World
from mgpu_ddp.inference.gpu_input import Portion
from mgpu_ddp.loader.batch import Batch, as_batch
from mgpu_ddp.loader.shared_slots import SharedSlots
from mgpu_ddp.loader.worker import BatchMaker, Order
from mgpu_ddp.preprocess.transform import Transform, imagenet
from tests.support.boxed import BROKEN, boxed, crop_of
from tests.support.sources import config_of

SQUARE = imagenet(16)
PNG = 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return boxed(tmp_path_factory.mktemp("boxes"))


def opened(made: Any, name: str, world: World) -> EncodedSamples:
    config = config_of(made[1][name])
    config.output = OutputConfig(fields=["size"])
    samples = open_samples(config, find_listing(config, None, world))
    assert isinstance(samples, EncodedSamples)
    return samples


def batch_of(samples: Any, *, packed: bool, indices: list[int] | None = None) -> Batch:
    indices = indices if indices is not None else [*range(len(samples))]
    slots = SharedSlots(1, len(indices), (16, 16, 3), packed=packed)
    maker = BatchMaker(samples, SQUARE, slots, LoaderConfig(), packed=packed)
    return as_batch(maker.make(Order(indices=indices)), slots)


def cropped(path: Path, box: list[float], transform: Transform = SQUARE) -> Any:
    crop = crop_of(path, box) if int(path.stem) not in BROKEN else None
    return None if crop is None else transform.geometry(crop)


@pytest.mark.parametrize("name", ["list", "parquet"])
def test_an_image_is_decoded_once_for_its_boxes(
    made: Any, world: World, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    decoded: list[bytes] = []

    def decode(data: bytes, side: int | None = None) -> Any:
        decoded.append(data)
        return encoded_decode(data, side)

    encoded_decode = encoded.decode
    monkeypatch.setattr(encoded, "decode", decode)
    batch = batch_of(opened(made, name, world), packed=False)
    boxes = made[0]
    assert len(batch.errors) == 13
    for row, (path, box) in enumerate(boxes):
        want = cropped(path, box)
        assert (want is None) == (row in batch.errors)
        assert np.array_equal(batch.pixels[row].numpy(), np.zeros((16, 16, 3)) if want is None else want)
    good = {path for path, _ in boxes if int(path.stem) not in BROKEN}
    assert sum(data != b"not an image" for data in decoded) == len(good) < len(boxes)
    assert batch.clipped == 10


@pytest.mark.parametrize("name", ["list", "parquet"])
def test_an_image_is_packed_once_for_its_boxes(made: Any, world: World, name: str) -> None:
    samples = opened(made, name, world)
    fetched: list[int] = []
    fetch = samples.fetch
    samples.fetch = lambda index: fetched.append(index) or fetch(index)  # type: ignore[func-returns-value, method-assign]
    batch = batch_of(samples, packed=True)
    jpegs = batch.jpegs
    assert jpegs is not None
    paths = [path for path, _ in made[0]]
    packed = [row for row in range(len(paths)) if row in jpegs.rows]
    assert {int(path.stem) for path in paths} - {int(paths[row].stem) for row in packed} == {*BROKEN, 5, PNG}
    assert [jpegs.content(number) for number in range(len(jpegs))] == [paths[row].read_bytes() for row in packed]
    images = jpegs[jpegs.firsts]
    assert len(images) == len({paths[row] for row in packed}) == len({*jpegs.addresses.tolist()})
    assert jpegs.pixels == int((images.heights * images.widths).sum())
    assert len(fetched) == len({*paths})
    # What the GPU will do, done by Pillow.
    portion = Portion([batch], [0])
    for number in range(len(jpegs)):
        portion.decode_on_cpu(number, SQUARE.geometry)
    for row, (path, box) in enumerate(made[0]):
        want = cropped(path, box)
        assert (want is None) == (row in batch.errors)
        assert np.array_equal(batch.pixels[row].numpy(), np.zeros((16, 16, 3)) if want is None else want)
    assert batch.clipped == 10


def test_both_lanes_carry_the_same(made: Any, world: World) -> None:
    samples = opened(made, "list", world)
    lanes = [batch_of(samples, packed=packed).carried for packed in (False, True)]
    assert lanes[0]["width"].tolist() == lanes[1]["width"].tolist()
    assert lanes[0]["height"].tolist() == lanes[1]["height"].tolist()
    assert np.array_equal(lanes[0]["box"], lanes[1]["box"], equal_nan=True)
    assert np.ma.getmaskarray(lanes[0]["width"]).sum() == 10


def test_chosen_boxes_are_those_of_the_dataset(made: Any, world: World) -> None:
    chosen = ChosenSamples(opened(made, "list", world), np.array([2, 30, 31]))
    batch = batch_of(chosen, packed=False)
    for row, index in enumerate((2, 30, 31)):
        path, box = made[0][index]
        want = cropped(path, box)
        assert want is not None
        assert np.array_equal(batch.pixels[row].numpy(), want)
    assert batch.carried["box"].tolist() == [made[0][index][1] for index in (2, 30, 31)]


def test_pieces_of_an_image_are_joined_and_each_image_is_found(made: Any, world: World) -> None:
    samples = opened(made, "list", world)
    first, second = (batch_of(samples, packed=True, indices=[*range(*stretch)]) for stretch in ((0, 6), (6, 40)))
    portion = Portion([first, second], [0, 6])
    counts = np.diff(np.append(portion.jpegs.firsts, len(portion.jpegs)))
    assert counts.max() > 1
    for start, stop in ((0, len(portion.images)), (1, 4), (2, 3)):
        numbers, places = portion.jpegs.of_images(np.arange(start, stop))
        assert np.array_equal(portion.jpegs.addresses[numbers], portion.images.addresses[start:stop][places])
        assert len(numbers) == counts[start:stop].sum()


@pytest.mark.parametrize(("batch_size", "block", "wanted"), [(32, 1, 256), (48, 1, 288), (600, 1, 600), (32, 8, 8)])
def test_the_boxes_of_an_image_stay_on_a_rank(
    made: Any, world: World, batch_size: int, block: int, wanted: int
) -> None:
    from mgpu_ddp.job.plan import Planner
    from tests.support.choices import resolved

    config = config_of(replace(made[1]["list"]))
    config.loader.block = block
    choices = resolved(batch_size=batch_size, collect="gather")
    plan = Planner(config=config, resolved=choices, types=(), world=world).plan(0, 10_000)
    assert plan.block == wanted
    config.data.box_column = None
    assert Planner(config=config, resolved=choices, types=(), world=world).plan(0, 10_000).block == block
