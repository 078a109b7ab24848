"""The transform that a job applies: named, the weights' own, and what keys replace of it."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from mgpu_ddp.config.schema import ArrayConfig, Config, FakeConfig, FolderConfig, ModelConfig, TransformConfig
from mgpu_ddp.errors import UsageError
from mgpu_ddp.models.build import build_model
from mgpu_ddp.models.input_transform import choose_transform
from mgpu_ddp.models.model import Model
from mgpu_ddp.preprocess import transform
from mgpu_ddp.preprocess.transform import MEAN, STD, Transform
from tests.support.samples import photo

PHOTOS = FolderConfig(root="x")
BARE = Model(module=torch.nn.Identity(), num_classes=5, identity={}, origin="", class_names=None, preset=None)


def job(name: str = "squeezenet1_1", *, weights: str | None = None, **changes: Any) -> Config:
    model = ModelConfig(name=name, weights=weights)
    return Config(**{"data": PHOTOS, "transform": TransformConfig(), "model": model} | changes)


def chosen(model: Model = BARE, data: Any = PHOTOS, **keys: Any) -> Transform:
    found = choose_transform(job(data=data, transform=TransformConfig(**keys)), model)
    assert isinstance(found, Transform)
    return found


@pytest.fixture(scope="module")
def swin() -> Model:
    """A model with weights whose transform is bicubic, 232 to 224."""
    return build_model(job("swin_t", weights="DEFAULT"))


def test_the_transform_follows_data_and_weights(swin: Model) -> None:
    assert chosen(data=FakeConfig()) == transform.plain(224)
    assert chosen(swin, FakeConfig()) == transform.plain(224)
    assert chosen() == transform.imagenet(224)
    own = chosen(swin)
    assert (own.resize, own.crop, own.interpolation) == ((232,), 224, "bicubic")
    assert chosen(swin, name="plain", size=9).resize == (9, 9)
    assert chosen(name="imagenet", size=64) == transform.imagenet(64)


def torchvisions(*geometry: Any, mean: Any = MEAN, std: Any = STD) -> Any:
    return transforms.Compose([*geometry, transforms.ToTensor(), transforms.Normalize(mean, std)])


BICUBIC, NEAREST, LANCZOS = (transforms.InterpolationMode(name) for name in ("bicubic", "nearest", "lanczos"))
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "re-identification": (
        {"resize": [64, 32], "crop": None, "mean": 0.5, "std": 0.25},
        torchvisions(transforms.Resize((64, 32)), mean=[0.5] * 3, std=[0.25] * 3),
    ),
    "portrait": (
        {"resize": 50, "crop": [48, 30], "interpolation": "bicubic"},
        torchvisions(transforms.Resize(50, BICUBIC), transforms.CenterCrop((48, 30))),
    ),
    "crop alone": (
        {"crop": [101, 64]},
        torchvisions(transforms.Resize(256), transforms.CenterCrop((101, 64))),
    ),
    "both sides, then a crop": (
        {"resize": [40, 71], "crop": 39, "interpolation": "lanczos"},
        torchvisions(transforms.Resize((40, 71), LANCZOS), transforms.CenterCrop(39)),
    ),
    "size and interpolation": (
        {"size": 33, "interpolation": "nearest"},
        torchvisions(transforms.Resize(38, NEAREST), transforms.CenterCrop(33)),
    ),
    "plain with a mean": (
        {"name": "plain", "size": 20, "mean": [0.1, 0.2, 0.3]},
        torchvisions(transforms.Resize((20, 20)), mean=[0.1, 0.2, 0.3], std=[1.0] * 3),
    ),
    "levels as they are": (
        {"mean": 0, "std": 1, "crop": 200},
        torchvisions(transforms.Resize(256), transforms.CenterCrop(200), mean=[0.0] * 3, std=[1.0] * 3),
    ),
}
SIZES = [(1, 1), (2, 300), (300, 2), (37, 90), (91, 38), (64, 32), (50, 50), (333, 500)]


@pytest.mark.parametrize("case", CASES)
def test_keys_give_the_bits_of_torchvision(case: str) -> None:
    keys, reference = CASES[case]
    ours = chosen(**keys)
    for width, height in SIZES:
        image = photo(width, height)
        pixels = torch.from_numpy(ours.geometry(image).copy())
        assert pixels.shape == ours.shape
        got = ours.normalise(pixels[None], dtype=torch.float32, channels_last=False)[0]
        assert torch.equal(got, reference(image)), (width, height)


def test_keys_replace_the_weights_own_one_by_one(swin: Model, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mgpu_ddp"):
        found = chosen(swin, crop=[224, 96], mean=0.5)
    assert (found.resize, found.crop, found.interpolation) == ((232,), (224, 96), "bicubic")
    assert (found.mean, found.std) == ((0.5, 0.5, 0.5), STD)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "mgpu_ddp"]
    assert line == (
        "the weights' own transform (resize shorter side to 232, bicubic, crop 224x224, mean 0.485 0.456 0.406, std"
        " 0.229 0.224 0.225) but for transform.crop, transform.mean"
    )


@pytest.mark.parametrize(
    ("weights", "name", "times"), [("w.pt", "auto", 1), ("w.pt", "imagenet", 0), (None, "auto", 0)]
)
def test_what_a_checkpoint_does_not_say_is_said(
    caplog: pytest.LogCaptureFixture, weights: str | None, name: str, times: int
) -> None:
    with caplog.at_level(logging.INFO, "mgpu_ddp"):
        choose_transform(job(weights=weights, transform=TransformConfig(name=name)), BARE)
    assert caplog.text.count("a checkpoint does not say how its images were prepared") == times


def test_a_transform_stands_in_the_manifest_as_before_and_however_it_is_written() -> None:
    """Folders of earlier versions continue."""
    before = {
        "resize": [256],
        "crop": 224,
        "interpolation": "bilinear",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    assert chosen().described() == before
    same = chosen(resize=[256], crop=[224, 224], interpolation="bilinear", mean=list(MEAN), std=list(STD))
    assert same.described() == before
    assert chosen(crop=[224, 96]).described() == before | {"crop": [224, 96]}


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"crop": 257}, "transform.crop must be within the resized image (shorter side 256), got 257. Raise"),
        ({"crop": [8, 257]}, "transform.crop must be within the resized image (shorter side 256), got [8, 257]. "),
        (
            {"resize": [64, 32], "crop": [32, 64]},
            "transform.crop must be within the resized image (64x32), got [32, 64]",
        ),
        ({"resize": [256, 128]}, "transform.resize must be at least the crop, 224x224, got [256, 128]. Raise it, or "),
        ({"resize": 223}, "transform.resize must be at least the crop, 224x224, got 223. "),
        ({"crop": None}, "transform.crop must be a size where the shorter side alone is resized, got None. Give "),
        ({"resize": 64, "crop": None}, "transform.resize must be [height,width] where nothing is cropped, got 64. "),
        ({"name": "plain", "resize": 64}, "transform.resize must be [height,width] where nothing is cropped, got 64."),
        (
            {"resize": 10**30},
            "transform.resize must be such that resized squares have at most 89,478,485 pixels, got ",
        ),
        ({"resize": [10**6, 10**6], "crop": 8}, "transform.resize must be at most 89,478,485 pixels, got [1000000, "),
        ({"size": 20000}, "transform.size must be such that resized squares have at most 89,478,485 pixels, got 20000"),
        ({"size": 64, "resize": 80, "crop": 64}, "transform.size must be left out where other keys say all of its si"),
        ({"size": 64, "name": "plain", "resize": [8, 8]}, "transform.size must be left out where other keys say all"),
    ],
)
def test_keys_that_contradict_each_other_are_one_line(keys: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError) as raised:
        chosen(**keys)
    assert str(raised.value).startswith(line)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("keys", [{"crop": 256}, {"resize": [224, 224]}, {"resize": [224, 300]}, {"crop": [1, 256]}])
def test_a_crop_may_be_the_whole_image(keys: dict[str, Any]) -> None:
    found = chosen(**keys)
    assert found.geometry(Image.new("RGB", (301, 299))).shape == found.shape


@pytest.mark.parametrize("keys", [{"crop": [30, 20]}, {"crop": [30, 20], "mean": 0.5}])
def test_an_array_of_the_size_that_is_asked_for_is_only_normalised(tmp_path: Path, keys: dict[str, Any]) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 30, 20, 3), np.uint8))
    data = ArrayConfig(path=str(tmp_path / "x.npy"))
    assert chosen(data=data, **keys).resize == (30, 20)
    assert chosen(data=data, **keys).cut(30, 20) == (0, 0)
    explicit = chosen(data=data, resize=40, **keys)
    assert (explicit.resize, explicit.crop) == ((40,), (30, 20))
