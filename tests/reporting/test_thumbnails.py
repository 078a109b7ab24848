"""Every sample that was predicted and is shown has a thumbnail, whatever it was read from."""

import base64
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mgpu_ddp.config.schema import ArrayConfig, FakeConfig, ListConfig
from mgpu_ddp.data.array import ArraySamples
from mgpu_ddp.data.fake import FakeSamples
from mgpu_ddp.data.files import FileSamples
from mgpu_ddp.data.list_file import read_list
from mgpu_ddp.data.listing import Listing
from mgpu_ddp.data.samples import Samples
from mgpu_ddp.data.script_dataset import ItemKind, ScriptSamples
from mgpu_ddp.output.manifest import Manifest
from mgpu_ddp.preprocess.transform import AnyTransform, TensorInput, plain
from mgpu_ddp.reporting.thumbnails import MAX_CHARACTERS, PIXELS, make_thumbnails
from tests.support.run_folders import wanted

RED = (220, 30, 30)


def red(mode: str = "RGB", size: tuple[int, int] = (300, 200)) -> Image.Image:
    return Image.new("RGB", size, RED).convert(mode)


def manifest(transform: AnyTransform) -> Manifest:
    return wanted(fingerprint={f"transform.{key}": value for key, value in transform.described().items()})


def made(samples: Samples, transform: AnyTransform, **changes: Any) -> list[Image.Image]:
    """The thumbnails of all samples, decoded."""
    found, left_out = make_thumbnails(samples, range(len(samples)), manifest(transform), math.inf)
    assert (list(found), left_out) == (list(range(len(samples))), 0)
    images = []
    for uri in found.values():
        assert uri is not None
        images.append(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,")))))
    return images


def test_a_box_is_shown_and_not_its_image(tmp_path: Path) -> None:
    image = Image.new("RGB", (300, 200))
    image.paste(RED, (100, 50, 180, 90))
    image.save(tmp_path / "a.png")
    (tmp_path / "list.csv").write_text('path,box\na.png,"[[100,50,180,90],[120,60,170,80]]"\n')
    data = ListConfig(path=str(tmp_path / "list.csv"), box_column="box")
    shown = made(FileSamples(str(tmp_path), read_list(data)), plain(64))
    assert [each.size for each in shown] == [(80, 40), (50, 20)]
    for each in shown:
        assert np.abs(np.asarray(each).astype(int) - RED).max() < 12


def files(root: Path) -> FileSamples:
    names = sorted(path.name for path in root.iterdir())
    return FileSamples(str(root), Listing.build([name.encode() for name in names]))


@pytest.mark.parametrize(
    "transform", [plain(64), TensorInput(shape=(3, 8, 8), function=lambda image: torch.zeros(3, 8, 8), name="f")]
)
def test_an_image_of_any_format_has_one_whatever_the_transform(tmp_path: Path, transform: AnyTransform) -> None:
    for name in ("a.png", "b.webp", "c.tiff", "d.bmp", "e.gif", "f.jpg"):
        red().save(tmp_path / name)
    red("CMYK").save(tmp_path / "g.jpg")
    red("RGBA").save(tmp_path / "h.png")
    red(size=(3000, 2)).save(tmp_path / "i.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    red().save(tmp_path / "j.jpg", exif=exif)
    images = made(files(tmp_path), transform)
    assert [image.size for image in images] == [*[(PIXELS, 85)] * 8, (PIXELS, 1), (85, PIXELS)]
    for image in images:
        assert image.convert("RGB").getpixel((5, 0)) == pytest.approx(RED, abs=30)


def test_decoded_images_have_one(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.full((3, 40, 60, 3), RED, np.uint8))
    images = made(ArraySamples(ArrayConfig(path=str(tmp_path / "images.npy"))), plain(8))
    assert [image.convert("RGB").getpixel((5, 5)) for image in images] == [pytest.approx(RED, abs=30)] * 3
    assert len(made(FakeSamples(FakeConfig(size=3, image_size=[1, 8, 8])), plain(8))) == 3


@pytest.mark.parametrize("shape", [(3, 8, 9), (1, 8, 9)])
def test_model_input_of_a_dataset_has_one_in_its_own_range(shape: tuple[int, ...]) -> None:
    items = [torch.linspace(-3, 5, math.prod(shape)).reshape(shape), torch.zeros(shape)]
    images = made(ScriptSamples(items, ItemKind(image="tensor", carried={}, shape=shape)), TensorInput(shape=shape))
    assert [image.size for image in images] == [(9, 8)] * 2
    extrema = [each for channel in images[0].getextrema() for each in channel]  # type: ignore[union-attr]
    assert (min(extrema) < 30, max(extrema) > 225) == (True, True)


def test_an_image_that_is_gone_or_no_picture_has_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.png", "b.png"):
        red().save(tmp_path / name)
    samples = files(tmp_path)
    (tmp_path / "a.png").unlink()
    found, left_out = make_thumbnails(samples, [0, 1], manifest(plain(8)), math.inf)
    assert [uri is None for uri in found.values()] == [True, False]
    assert left_out == 0
    spectrum = ScriptSamples([torch.zeros(7)], ItemKind(image="tensor", carried={}, shape=(7,)))
    assert make_thumbnails(spectrum, [0], manifest(TensorInput(shape=(7,))), math.inf) == ({0: None}, 0)


def test_what_there_is_no_time_or_room_for_is_left_out() -> None:
    noise = FakeSamples(FakeConfig(size=400))
    assert make_thumbnails(noise, range(12), manifest(plain(224)), 0.0) == ({}, 12)
    found, left_out = make_thumbnails(noise, [*range(400), 0, 1], manifest(plain(224)), math.inf)
    assert len(found) + left_out == 400
    assert left_out > 0
    assert 0.9 * MAX_CHARACTERS < sum(len(uri or "") for uri in found.values()) <= MAX_CHARACTERS
