"""Names of datasets → samples: FakeData bit for bit, and the files of a folder."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import FakeData

from mgpu_ddp.config.schema import GROUPS, ArrayConfig, Config, FakeConfig, FolderConfig
from mgpu_ddp.data.datasets import SOURCES, find_listing, identity, open_samples
from mgpu_ddp.data.fake import FakeSamples
from mgpu_ddp.data.files import FileSamples, find_images
from mgpu_ddp.data.listing import Listing
from mgpu_ddp.data.samples import ChosenSamples, Samples
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import UsageError
from mgpu_ddp.preprocess.transform import MEAN, STD, Pixels, StageClock, Transform, imagenet, plain
from tests.support.heics import PLAIN, QUARTERS
from tests.support.loading import load_all
from tests.support.samples import encoded, ignore_time, photo
from tests.support.sources import config_of, open_source, sources


def model_input(samples: FakeSamples, index: int, transform: Transform) -> tuple[torch.Tensor, int]:
    pixels, label = samples.load(index, transform, ignore_time)
    return transform.normalise(torch.from_numpy(pixels.copy())[None], dtype=torch.float32, channels_last=False)[
        0
    ], label


@pytest.mark.parametrize(
    ("image_size", "size"),
    [
        ([3, 224, 224], 224),  # the tutorial's: nothing to resize
        ([3, 64, 48], 32),
        ([3, 5, 7], 9),
        ([3, 1, 1], 4),  # fewer than 16 numbers: torch.randn takes another path
        ([1, 40, 30], 28),
        ([1, 3, 3], 3),
    ],
)
@pytest.mark.parametrize("random_offset", [0, 1234])
def test_fake_samples_are_torchvisions_bit_for_bit(image_size: list[int], size: int, random_offset: int) -> None:
    steps = [transforms.Resize((size, size)), transforms.ToTensor()]
    theirs = FakeData(20, tuple(image_size), 7, transforms.Compose(steps), random_offset=random_offset)
    ours = FakeSamples(FakeConfig(size=20, image_size=image_size, num_classes=7, random_offset=random_offset))
    assert len(ours) == len(theirs)
    for index in (19, 0, 3, 0):  # in any order, and again
        image, target = theirs[index]
        pixels, label = model_input(ours, index, plain(size))
        assert torch.equal(pixels, image.expand(3, -1, -1))
        assert label == int(target)
        assert ours.path(index) is None


def test_fake_samples_take_the_imagenet_transform_too() -> None:
    steps = [transforms.Resize(64), transforms.CenterCrop(56), transforms.ToTensor()]
    reference = transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])
    image, _ = FakeData(3, (3, 40, 90), transform=reference)[2]
    pixels, _ = model_input(FakeSamples(FakeConfig(size=3, image_size=[3, 40, 90])), 2, imagenet(56))
    assert torch.equal(pixels, image)


def test_fake_samples_leave_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    FakeSamples(FakeConfig(size=3)).load(1, plain(224), ignore_time)
    assert torch.equal(torch.get_rng_state(), before)


def test_folder_samples_load_by_the_listing(tmp_path: Path) -> None:
    for name, seed in ((b"cat/\xff.png", 1), (b"dog/a\nb.png", 2)):
        path = Path(str(tmp_path)) / name.decode("utf-8", "surrogateescape")
        path.parent.mkdir()
        path.write_bytes(encoded(photo(30, 20, seed), "PNG"))
    samples = FileSamples(str(tmp_path), Listing.build(find_images(str(tmp_path)).paths))
    assert len(samples) == 2
    assert [samples.path(i) for i in range(2)] == [r"cat/\udcff.png", "dog/a\nb.png"]
    stages: set[str] = set()
    for index, seed in ((1, 2), (0, 1)):
        pixels, label = samples.load(index, plain(20), lambda stage, _seconds: stages.add(stage))
        assert np.array_equal(pixels, np.asarray(photo(30, 20, seed).resize((20, 20), 2)))
        assert label == index
    assert stages == {"read", "decode", "resize"}


def folder_config(root: Path) -> Config:
    return config_of(FolderConfig(root=str(root)))


def test_a_folder_without_images_is_the_users_mistake(tmp_path: Path, world: World) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UsageError, match=r"data\.root='.*' holds no image \(jpg, jpeg, .*\)\. "):
        find_listing(folder_config(tmp_path), None, world)


def test_a_continued_folder_keeps_its_listing_and_appends(tmp_path: Path, world: World) -> None:
    (tmp_path / "b.png").touch()
    config = folder_config(tmp_path)
    known = find_listing(config, None, world)
    assert known is not None
    (tmp_path / "a.png").touch()

    def listed(known: Listing | None) -> list[bytes]:
        found = find_listing(config, known, world)
        assert found is not None
        return [found.path(i) for i in range(len(found))]

    assert listed(None) == [b"a.png", b"b.png"]
    assert listed(known) == [b"b.png", b"a.png"]
    config.shard = "0/2"
    assert listed(known) == [b"b.png"], "the borders of shards must not move"
    assert open_samples(config, known).path(0) == "b.png"


class Grey(Samples):
    """The least that a source needs to have."""

    def __len__(self) -> int:
        return 6

    def load(
        self, index: int, transform: Transform, clock: StageClock, data: bytes | None = None
    ) -> tuple[Pixels, int]:
        return np.full((*transform.out_size, 3), index, np.uint8), index


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_needs_a_length_and_images_alone(world: World, workers: int) -> None:
    samples = ChosenSamples(Grey(), np.array([5, 0, 3]))
    loaded = load_all(samples, world, workers=workers)
    assert (loaded.index, loaded.labels, loaded.errors) == ([0, 1, 2], [5, 0, 3], {})
    assert [set(pixels.flatten().tolist()) for pixels in loaded.pixels] == [{5}, {0}, {3}]
    assert samples.names(np.arange(3)).to_pylist() == [None] * 3


def test_every_kind_of_data_has_a_source_and_arrays_an_identity_of_their_own(tmp_path: Path) -> None:
    assert set(SOURCES) == set(GROUPS["data"].values())
    np.save(tmp_path / "x.npy", np.zeros((2, 8, 8, 3), np.uint8))
    assert "(2, 8, 8, 3), modified " in str(identity(config_of(ArrayConfig(path=str(tmp_path / "x.npy")))))
    assert identity(config_of(FakeConfig())) is None


def test_fake_data_needs_no_listing(world: World) -> None:
    config = config_of(FakeConfig(size=3))
    assert find_listing(config, None, world) is None
    assert isinstance(open_samples(config, None), FakeSamples)


def test_every_source_reads_heic_and_avif_whatever_they_are_called(tmp_path: Path, world: World) -> None:
    avif = io.BytesIO()
    Image.new("RGB", (64, 48), QUARTERS[0]).save(avif, "AVIF")
    images = [tmp_path / name for name in ("a.jpg", "b.jpg", "c.heic", "d.avif", "e.png", "f.png")]
    for path, data in zip(images, (PLAIN, avif.getvalue()) * 3, strict=True):
        path.write_bytes(data)
    every: dict[str, Any] = {"folder": FolderConfig(root=str(tmp_path)), **sources(tmp_path, images, [None] * 6)}
    # No member holds a label.
    every["webdataset"] = replace(every["webdataset"], label_extension=None)
    for name, data in every.items():
        samples = open_source(data, world)
        loaded = [samples.load(i, plain(8), ignore_time)[0] for i in range(len(samples))]
        assert len(loaded) == 6, name
        assert np.abs(np.stack([pixels[1, 1] for pixels in loaded]).astype(int) - QUARTERS[0]).max() <= 6, name
