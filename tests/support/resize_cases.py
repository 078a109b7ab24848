"""Shared by the tests of the kernel: pictures, every transform there is, and the oracle."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torchvision.models import EfficientNet_B1_Weights, ResNet18_Weights

from mgpu_ddp.preprocess.nvjpeg import Images
from mgpu_ddp.preprocess.transform import EXIF_ORIENTATION, Transform, from_weights, imagenet, plain, upright


def transforms(size: int) -> dict[str, Transform]:
    """Everything that keys of the transform and named weights can ask for, and what `Transform` can say beyond it."""
    return {
        "plain": plain(size),
        "imagenet": imagenet(size),
        "bilinear weights": from_weights(ResNet18_Weights.IMAGENET1K_V1.transforms(), size),
        "bicubic weights": from_weights(EfficientNet_B1_Weights.IMAGENET1K_V1.transforms(), size),
        "padded": Transform(resize=(size // 2,), crop=size, interpolation="bicubic"),
        "nearest": Transform(resize=(size, size + 9), interpolation="nearest"),
        "lanczos": Transform(resize=(size + 3,), crop=size, interpolation="lanczos"),
        "tall": Transform(resize=(2 * size, size), mean=(0.5,) * 3, std=(0.25,) * 3),
        "wide crop": Transform(resize=(size + 5,), crop=(size // 2, size + 3), interpolation="bicubic"),
        "both sides, then a crop": Transform(resize=(size, size + 7), crop=(size - 3, size), interpolation="lanczos"),
        "rounded down": Transform(resize=(size + 3, size + 7), crop=size, floors=True),
        "nearest crop": Transform(resize=(size + 4,), crop=(size + 1, size // 2), interpolation="nearest"),
    }


def picture(height: int, width: int, seed: int) -> torch.Tensor:
    """Noise in its left half and a smooth right half, uint8 (3, height, width): as a decoder returns it."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    coarse = Image.fromarray(random.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    pixels[:, width // 2 :] = smooth[:, width // 2 :]
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def packed(images: Sequence[torch.Tensor], device: str = "cpu") -> Images:
    """Images of any size in one buffer, on a device."""
    sizes = np.array([image.shape[1:] for image in images], dtype=np.int64).reshape(-1, 2)
    starts = np.cumsum(3 * sizes.prod(1)) - 3 * sizes.prod(1)
    data = torch.cat([torch.empty(0, dtype=torch.uint8), *(image.flatten() for image in images)]).to(device)
    return Images(data=data, starts=starts, heights=sizes[:, 0], widths=sizes[:, 1])


def oracle(
    image: torch.Tensor, orientation: int, transform: Transform, window: Sequence[int] | None = None
) -> torch.Tensor:
    """The same pixels by the CPU path, uint8 (height, width, 3); of a window of the upright image, or all of it."""
    stored = Image.fromarray(image.permute(1, 2, 0).numpy())
    stored.getexif()[EXIF_ORIENTATION] = orientation
    whole = upright(stored)
    return torch.from_numpy(transform.geometry(whole.crop(tuple(window)) if window is not None else whole).copy())


def windows(images: Images, orientations: Sequence[int], number: int) -> npt.NDArray[np.int64]:
    """A window of each upright image: at its corners, a pixel, a strip, or anywhere."""
    random = np.random.default_rng(number)
    found = []
    for height, width, orientation in zip(images.heights.tolist(), images.widths.tolist(), orientations, strict=True):
        right, bottom = (height, width) if orientation >= 5 else (width, height)
        x0, y0 = (int(random.integers(side)) for side in (right, bottom))
        x1, y1 = (int(random.integers(first + 1, side + 1)) for first, side in ((x0, right), (y0, bottom)))
        kinds = [(x0, y0, right, bottom), (0, 0, x1, y1), (x0, y0, x0 + 1, y0 + 1), (x0, y0, x1, y1)]
        found.append(kinds[(len(found) + number) % len(kinds)])
    return np.array(found, dtype=np.int64).reshape(-1, 4)


def expected(images: Sequence[torch.Tensor], orientations: Sequence[int], transform: Transform) -> torch.Tensor:
    """The batch that the CPU path yields, fp32 (n, 3, height, width)."""
    pixels = [oracle(image, o, transform) for image, o in zip(images, orientations, strict=True)]
    return transform.normalise(torch.stack(pixels), dtype=torch.float32, channels_last=False)


def difference(got: torch.Tensor, want: torch.Tensor, transform: Transform) -> tuple[float, float]:
    """The largest and the mean difference of two fp32 batches, in units of 1/255 before normalising."""
    std = torch.tensor(transform.std or (1.0, 1.0, 1.0)).view(1, 3, 1, 1)
    apart = (got - want).abs() * std * 255
    return float(apart.max()), float(apart.mean())


def centre(size: int, crop: int, transform: Transform) -> tuple[slice, slice]:
    """The stretches that a centre crop copies along one axis: (of the crop, of the image)."""
    if size < crop:
        first = (crop - size) // 2
        return slice(first, first + size), slice(0, size)
    first = (size - crop) // 2 if transform.floors else round((size - crop) / 2.0)
    return slice(0, crop), slice(first, first + crop)
