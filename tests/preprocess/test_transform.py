"""From the bytes of an image to model input: bit for bit what torchvision and a careful viewer would show."""

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, UnidentifiedImageError
from torchvision import transforms

from mgpu_ddp.preprocess.transform import MEAN, STD, Transform, decode, from_weights, imagenet, plain
from tests.support.samples import encoded, photo

Reference = Callable[[Image.Image], torch.Tensor]

FILES = {
    "landscape": ("JPEG", 300, 200),
    "portrait": ("PNG", 90, 231),
    "dot": ("PNG", 1, 1),
    "tall": ("JPEG", 1, 500),
    "wide": ("PNG", 500, 1),
}


def model_input(data: bytes, transform: Transform, *, channels_last: bool = True) -> torch.Tensor:
    """Model input as the package makes it from one image file: float32 (3, height, width)."""
    pixels = torch.from_numpy(transform.geometry(decode(data)).copy())
    assert tuple(pixels.shape) == (*transform.out_size, 3)
    return transform.normalise(pixels[None], dtype=torch.float32, channels_last=channels_last)[0]


def torchvision_plain(size: int) -> Reference:
    return transforms.Compose([transforms.Resize((size, size)), transforms.ToTensor()])


def torchvision_imagenet(resize: int, crop: int) -> Reference:
    steps = [transforms.Resize(resize), transforms.CenterCrop(crop), transforms.ToTensor()]
    return transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    ("transform", "reference"),
    [
        (plain(224), torchvision_plain(224)),
        (plain(17), torchvision_plain(17)),
        (imagenet(224), torchvision_imagenet(256, 224)),
        (imagenet(64), torchvision_imagenet(73, 64)),
        (imagenet(299), torchvision_imagenet(342, 299)),
    ],
    ids=["plain224", "plain17", "imagenet224", "imagenet64", "imagenet299"],
)
def test_model_input_has_the_bits_of_torchvision(file: str, transform: Transform, reference: Reference) -> None:
    kind, width, height = FILES[file]
    data = encoded(photo(width, height), kind)
    expected = reference(Image.open(io.BytesIO(data)).convert("RGB"))
    assert torch.equal(model_input(data, transform), expected)


@pytest.mark.parametrize(
    "model",
    [
        "resnet18",
        "resnet50",
        "inception_v3",  # resize 342, crop 299
        "mobilenet_v3_large",  # resize 232
        "efficientnet_b1",  # crop 240, resize 255
        "efficientnet_v2_s",  # crop 384
        "vit_b_16",
        "vit_l_16",  # SWAG weights are bicubic; DEFAULT resizes to 242
        "swin_t",  # bicubic
        "swin_v2_t",  # bicubic, crop 256
        "convnext_tiny",
        "maxvit_t",  # bicubic
    ],
)
def test_named_weights_bring_their_own_transform(model: str) -> None:
    for weights in torchvision.models.get_model_weights(model):
        preset = weights.transforms()
        image = photo(320, 411)
        ours = model_input(encoded(image, "PNG"), from_weights(preset, 224))
        assert torch.equal(ours, preset(image)), weights


def test_another_size_scales_the_preset() -> None:
    preset = torchvision.models.get_model_weights("swin_t").DEFAULT.transforms()  # bicubic, 232 to 224
    steps = [transforms.Resize(116, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(112)]
    reference = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    image = photo(320, 211)
    ours = model_input(encoded(image, "PNG"), from_weights(preset, 112))
    assert torch.equal(ours, reference(image))


def test_normalise_keeps_the_numbers_in_either_layout_and_lowers_precision_last() -> None:
    transform = imagenet(8)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8))
    last = transform.normalise(pixels, dtype=torch.float32, channels_last=True)
    first = transform.normalise(pixels, dtype=torch.float32, channels_last=False)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert first.is_contiguous()
    assert torch.equal(first, last)
    half = transform.normalise(pixels, dtype=torch.float16, channels_last=True)
    assert torch.equal(half, first.half())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(kind: str, orientation: int) -> None:
    upright = Image.new("RGB", (32, 48), "white")
    upright.paste((200, 20, 20), (0, 0, 16, 16))
    upright.paste((20, 20, 200), (0, 32, 16, 48))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transpose that stores it so
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    image = decode(encoded(stored, kind, exif=exif if kind == "TIFF" else exif.tobytes(), **options))
    assert image.size == upright.size
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(upright))
    assert difference.max() <= (12 if kind == "JPEG" else 0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_256_levels(kind: str) -> None:
    levels = (np.arange(256, dtype=np.uint16) << 8).reshape(16, 16) + 17
    shown = np.asarray(decode(encoded(Image.fromarray(levels), kind)))
    assert np.array_equal(shown, np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2))


def on_white(rgba: Image.Image) -> np.ndarray:
    values = np.asarray(rgba.convert("RGBA")).astype(float)
    alpha = values[..., 3:] / 255
    return values[..., :3] * alpha + 255 * (1 - alpha)


def test_transparency_lies_on_white() -> None:
    image = photo(20, 20).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((20, 20)))
    for stored in (image, image.convert("LA")):
        for kind in ("PNG", "WEBP"):
            options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
            shown = np.asarray(decode(encoded(stored, kind, **options))).astype(float)
            assert np.abs(shown - on_white(stored)).max() <= 1


def test_a_transparent_palette_entry_lies_on_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        shown = np.asarray(decode(encoded(image, kind, transparency=1)))
        assert shown.tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("PNG", "P"),
        ("PNG", "1"),
        ("PNG", "L"),
        ("BMP", "RGB"),
        ("BMP", "1"),
        ("GIF", "P"),
        ("GIF", "L"),
        ("TIFF", "RGB"),
        ("TIFF", "CMYK"),
        ("TIFF", "1"),
        ("WEBP", "RGB"),
        ("JPEG", "L"),
        ("JPEG", "CMYK"),
    ],
)
def test_every_mode_becomes_rgb(kind: str, mode: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    image = photo(40, 30).convert(mode)
    shown = decode(encoded(image, kind, **options))
    assert (shown.mode, shown.size) == ("RGB", (40, 30))
    difference = np.abs(np.asarray(shown).astype(int) - np.asarray(image.convert("RGB")))
    assert difference.mean() <= (3 if kind == "JPEG" else 0)


def test_an_animation_shows_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        red, _green, blue = decode(data).getpixel((4, 4))
        assert red > 240
        assert blue < 15, kind


@pytest.mark.parametrize("kind", ["PPM", "ICO", "TGA", "PCX", "EPS", "PDF", "ICNS", "DDS", "SGI"])
def test_only_allowed_formats_are_decoded_whatever_the_name_says(kind: str) -> None:
    with pytest.raises(UnidentifiedImageError):
        decode(encoded(photo(32, 32), kind))


def test_unreadable_metadata_does_not_cost_the_pixels() -> None:
    image = photo(16, 16)
    data = encoded(image, "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert np.array_equal(np.asarray(decode(data)), np.asarray(image))


def test_a_strip_too_narrow_to_resize_is_refused_before_it_takes_the_memory() -> None:
    with pytest.raises(ValueError, match="20000x1 pixels are too narrow"):
        imagenet(224).geometry(Image.new("RGB", (20000, 1)))


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((1600, 1200), 150, (200, 150)),
        ((1600, 1200), 151, (400, 300)),
        ((1200, 1601), 256, (300, 401)),
        ((1600, 1200), 600, (800, 600)),
        ((1600, 1200), 601, (1600, 1200)),
        ((30, 20), 256, (30, 20)),
    ],
)
@pytest.mark.parametrize("progressive", [False, True])
def test_a_scaled_jpeg_has_no_side_below_what_it_is_resized_to(
    size: tuple[int, int], side: int, expected: tuple[int, int], progressive: bool
) -> None:
    data = encoded(photo(*size), "JPEG", quality=95, progressive=progressive)
    found = decode(data, side)
    assert (found.mode, found.size) == ("RGB", expected)
    factor = -(-size[0] // expected[0])
    mean = decode(data).reduce(factor)
    apart = np.abs(np.asarray(found, dtype=int) - np.asarray(mean, dtype=int))
    assert apart.mean() < 2


def test_scaling_turns_an_image_upright_and_leaves_other_formats() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(photo(1600, 1200), "JPEG", exif=exif), 150).size == (150, 200)
    data = encoded(photo(160, 120), "PNG")
    assert np.array_equal(np.asarray(decode(data, 15)), np.asarray(decode(data)))


@pytest.mark.parametrize(("floors", "corner"), [(False, (2, 4)), (True, (1, 3))])
def test_the_corner_of_a_crop_is_rounded_in_one_of_two_ways(floors: bool, corner: tuple[int, int]) -> None:
    transform = Transform(resize=(43, 47), crop=40, floors=floors)
    pixels = np.asarray(photo(47, 43))
    assert transform.cut(43, 47) == corner
    top, left = corner
    assert np.array_equal(transform.of_pixels(pixels), pixels[top : top + 40, left : left + 40])
    assert ("floors" in transform.described()) == floors


@pytest.mark.parametrize("transform", [imagenet(64), plain(64), Transform(resize=(40, 90))])
def test_a_transform_says_how_small_a_jpeg_may_come(transform: Transform) -> None:
    scaled = replace(transform, scaled=True)
    assert transform.decoded_side is None
    assert scaled.decoded_side == max(transform.resize)
    assert scaled.described() == transform.described(), "run folders of before know no such key"
    data = encoded(photo(1600, 1200), "JPEG", quality=95)
    small = scaled.geometry(decode(data, scaled.decoded_side))
    apart = np.abs(small.astype(int) - transform.geometry(decode(data)))
    assert 0 < apart.mean() < 4
