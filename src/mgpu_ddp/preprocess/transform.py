"""Image bytes → model input: decode, make upright RGB, resize and crop, then normalise.

The geometry runs where the image is decoded and yields uint8, exactly as torchvision's transforms do for a PIL image.
Scaling and normalising run on the model's device, on whole batches.
"""

import io
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from mgpu_ddp.errors import kind_of
from mgpu_ddp.preprocess import heic

Pixels = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]
Window = tuple[int, int, int, int]
"""Pixels of an image, (left, top, right, bottom), without the last two."""
StageClock = Callable[[str, float], None]
"""Takes a stage (`read`, `pack`, `decode`, `resize`, `generate`) and the seconds it took."""

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "AVIF")
"""The decoders that Pillow may use, whatever a file's name says. HEIC has one of its own."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIXTEEN_BIT = ("I", "I;16", "I;16L", "I;16B", "I;16N")
EXIF_ORIENTATION = 0x0112
TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that makes an image of each EXIF orientation upright."""
MAX_RESIZED_PIXELS = 89_478_485
"""Pillow's own limit for an image that is opened."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How decoded images of one size, in pixels, lie in memory."""

    height: int
    width: int
    planar: bool
    """The channels of an image lie apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Transform:
    """How an image becomes model input.

    `resize` is (height, width) or (shorter side,), `crop` the side of the centre square, (height, width) of what is no
    square, or None, all in pixels; `mean` and `std` are per channel, in units of 1, or None to leave values in [0, 1].
    """

    resize: tuple[int, ...]
    crop: int | tuple[int, int] | None = None
    interpolation: str = "bilinear"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scaled: bool = False
    """JPEGs are decoded at a fraction of their size, as `runtime.decode` says and the manifest with it."""
    floors: bool = False
    """An odd number of pixels around a crop has the smaller half above and left, as transformers has it, not where
    torchvision's rounding to even numbers puts it."""

    dtype: ClassVar[torch.dtype] = torch.uint8
    """Of an image after `geometry`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width, 3) of an image after `geometry`."""
        return (*self.out_size, 3)

    @property
    def out_size(self) -> tuple[int, int]:
        """(height, width) of the model input, in pixels."""
        if isinstance(self.crop, int):
            return self.crop, self.crop
        height, width = self.crop or self.resize
        return height, width

    def __str__(self) -> str:
        resized = "shorter side to " * (len(self.resize) == 1) + "x".join(map(str, self.resize))
        steps = [f"resize {resized}, {self.interpolation}"]
        if self.crop is not None:
            steps.append("crop {}x{}".format(*self.out_size))
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None:
                steps.append(f"{name} {' '.join(f'{value:.4g}' for value in values)}")
        return ", ".join(steps)

    @property
    def decoded_side(self) -> int | None:
        """The least side, in pixels, that a JPEG may be decoded at; None: at its own size alone."""
        return max(self.resize) if self.scaled else None

    def geometry(self, image: Image.Image) -> Pixels:
        """Resize and crop an RGB image: uint8 (height, width, 3), bitwise as torchvision does for PIL images.

        Raises:
            ValueError: a strip so narrow that resizing its shorter side would blow it up beyond reason.
        """
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as tvf

        if not self.may_resize(*image.size):
            raise ValueError(f"{image.width}x{image.height} pixels are too narrow a strip to resize and crop")
        image = tvf.resize(image, list(self.resize), InterpolationMode(self.interpolation))
        if self.crop is not None:
            height, width = self.out_size
            if self.floors and height <= image.height and width <= image.width:
                top, left = self._corner(image.height, image.width)
                image = image.crop((left, top, left + width, top + height))
            else:
                image = tvf.center_crop(image, [height, width])
        return np.asarray(image, dtype=np.uint8)

    def of_pixels(self, pixels: Pixels) -> Pixels:
        """The same for a decoded image, uint8 (height, width, 3), which stays as it is where it may."""
        if self.crop is None and self.resize == pixels.shape[:2]:
            return pixels
        return self.geometry(Image.fromarray(np.ascontiguousarray(pixels)))

    def described(self) -> dict[str, Any]:
        """As JSON values, for the manifest."""
        values = asdict(self)
        del values["scaled"]
        if not self.floors:
            # Folders that are older than the key go on.
            del values["floors"]
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    def placed(self, sizes: Integers) -> tuple[Integers, Integers]:
        """Resized sizes, and the output's corner in them, of images of these sizes, (height or width, n) each.

        As torchvision.transforms.functional.resize and center_crop compute them.
        """
        if len(self.resize) == 1:
            short, long = sizes.min(0), sizes.max(0)
            resized_long = (self.resize[0] * long / short).astype(np.int64)
            resized = np.where(sizes == short, self.resize[0], resized_long)
        else:
            resized = np.broadcast_to(np.array(self.resize)[:, None], sizes.shape)
        spare = resized - np.array(self.out_size)[:, None]
        half = spare // 2 if self.floors else np.rint(spare / 2).astype(np.int64)
        return resized, np.where(spare < 0, -(-spare // 2), half)

    def cut(self, height: int, width: int) -> tuple[int, int] | None:
        """The output's (top, left) in an image of this size that needs no resizing; None for any other."""
        target = (height, width) if len(self.resize) == 2 else (min(height, width),)
        out_height, out_width = self.out_size
        if self.resize != target or out_height > height or out_width > width:
            return None
        return self._corner(height, width)

    def _corner(self, height: int, width: int) -> tuple[int, int]:
        """(top, left) of the crop in a resized image that is no smaller."""
        spare = height - self.out_size[0], width - self.out_size[1]
        top, left = (each // 2 if self.floors else round(each / 2) for each in spare)
        return top, left

    def without_geometry(self, size: tuple[int, int]) -> "Transform":
        """The same transform for images that have this size, (height, width) in pixels, and keep it."""
        return replace(self, resize=size, crop=None, interpolation="bilinear")

    def may_resize(self, width: int, height: int) -> bool:
        """Check that an image does not become excessively large when its shorter side is resized."""
        short, long = sorted((width, height))
        return len(self.resize) == 2 or self.resize[0] ** 2 * long / short <= MAX_RESIZED_PIXELS

    def normalise(self, pixels: torch.Tensor, *, dtype: torch.dtype, channels_last: bool) -> torch.Tensor:
        """Turn uint8 (n, height, width, 3) into model input (n, 3, height, width) of `dtype`, on its device."""
        # This order gives the same bits as ToTensor and Normalize.
        images = pixels.permute(0, 3, 1, 2).to(torch.float32).div_(255)
        if self.mean is not None and self.std is not None:
            shape = (1, 3, 1, 1)
            images.sub_(_constant(self.mean, shape, images)).div_(_constant(self.std, shape, images))
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return images.to(dtype).contiguous(memory_format=layout)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInput:
    """Model input that the loader's workers make: by a function of the user's, or as a dataset yields it.

    `shape` is that of one sample, float32.
    """

    shape: tuple[int, ...]
    function: Callable[[Image.Image], torch.Tensor] | None = None
    """An upright RGB image → float Tensor (3, height, width)."""
    name: str | None = None
    """Tells the function from others in the manifest."""
    example: Pixels | None = field(default=None, compare=False, repr=False)
    """A sample of the dataset, to try the model with."""

    dtype: ClassVar[torch.dtype] = torch.float32
    decoded_side: ClassVar[None] = None

    def __str__(self) -> str:
        return f"{self.name or 'tensors'} of the script, {'x'.join(map(str, self.shape))}"

    def geometry(self, image: Image.Image) -> Pixels:
        """Apply the function: float32 of `shape`.

        Raises:
            ValueError: it returned something else.
        """
        assert self.function is not None
        # A plain image, which knows nothing of its file.
        return self.checked(self.function(image.copy()), "transform")

    def checked(self, value: Any, what: str) -> Pixels:
        """A float tensor as float32 of `shape`.

        Raises:
            ValueError: it is something else; begins with `what`.
        """
        ok = isinstance(value, torch.Tensor) and value.is_floating_point() and tuple(value.shape) == self.shape
        if not ok:
            raise ValueError(f"{what} gave {kind_of(value)}, not a float Tensor {self.shape} as at first")
        made: Pixels = value.detach().to(torch.float32).numpy()
        return made

    def of_pixels(self, pixels: Pixels) -> Pixels:
        return self.geometry(Image.fromarray(np.ascontiguousarray(pixels)))

    def cut(self, _height: int, _width: int) -> None:
        """No image is model input by being cut."""

    def may_resize(self, _width: int, _height: int) -> bool:
        return False

    def described(self) -> dict[str, Any]:
        return {"name": "script", "function": self.name, "shape": list(self.shape)}

    def normalise(self, tensors: torch.Tensor, *, dtype: torch.dtype, channels_last: bool) -> torch.Tensor:
        """Bring float32 (n, ...) to the model's dtype and layout, on its device."""
        if tensors.dim() != 4 or not channels_last:
            return tensors.to(dtype)
        return tensors.to(dtype).contiguous(memory_format=torch.channels_last)


AnyTransform = Transform | TensorInput


def copy_pixels(pixels: Pixels, into: Pixels) -> None:
    """Copy uint8 (..., height, width, 3); planar images plane by plane, which takes numpy a third of the time."""
    if pixels.strides[-1] == pixels.itemsize:
        into[:] = pixels
    else:
        for channel in range(pixels.shape[-1]):
            into[..., channel] = pixels[..., channel]


def _constant(values: tuple[float, ...], shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(shape)


def plain(size: int) -> Transform:
    """The tutorial's Resize((size, size)) and ToTensor()."""
    return Transform(resize=(size, size))


def imagenet(size: int) -> Transform:
    """Resize the shorter side to size*256/224, crop the centre, normalise with ImageNet's statistics."""
    return Transform(resize=(round(size * 256 / 224),), crop=size, mean=MEAN, std=STD)


def from_weights(preset: Any, size: int) -> Transform:
    """The transform that torchvision's weights were evaluated with, scaled where `size` is not 224."""
    resize, crop = tuple(preset.resize_size), preset.crop_size[0]
    if size != 224:
        resize, crop = tuple(round(side * size / crop) for side in resize), size
    return Transform(
        resize=resize,
        crop=crop,
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        floors=getattr(preset, "floors", False),
    )


def decode(data: bytes, side: int | None = None) -> Image.Image:
    """Decode an image file on the CPU into upright RGB; the first frame of an animation.

    With `side`, a JPEG comes at an eighth, a quarter or a half of its size, as long as no side is below that: libjpeg
    computes only these pixels, each about the mean of those it stands for.

    Raises whatever Pillow raises: OSError for most broken files, but ValueError, SyntaxError and others too.
    """
    if heic.is_heic(data):
        heic.register()
        return heic.decode_apart(lambda: _decode(data, (heic.FORMAT,), None))
    return _decode(data, FORMATS, side)


def _decode(data: bytes, formats: tuple[str, ...], side: int | None) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow warns of odd metadata and of large images; those past its limit are errors all the same.
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data), formats=formats)
        if side is not None:
            image.draft(None, (side, side))
        image.load()
        return to_rgb(upright(image))


def size_of(data: bytes) -> tuple[int, int] | None:
    """(width, height) of an upright JPEG, read from its header; None for anything else."""
    if not data.startswith(b"\xff\xd8"):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
        return image.size[::-1] if _orientation(image) >= 5 else image.size


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:
        # Unreadable metadata says nothing about the pixels: viewers show such a file as it is stored.
        return 1
    return int(value) if value in TRANSPOSED else 1


def upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation."""
    orientation = _orientation(image)
    # Pillow's own exif_transpose rewrites the metadata, and fails where any of it is malformed.
    return image.transpose(TRANSPOSED[orientation]) if orientation in TRANSPOSED else image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB: 16-bit grey keeps its upper 8 bits, transparency lies on white."""
    if image.mode in SIXTEEN_BIT:
        # Pillow's own conversion clips at 255, which turns almost every 16-bit pixel white.
        grey = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        upper = image.convert("RGBA")
        white = Image.new("RGBA", upper.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, upper).convert("RGB")
    # Of an image that is RGB already, Pillow would make a copy.
    return image if image.mode == "RGB" else image.convert("RGB")
