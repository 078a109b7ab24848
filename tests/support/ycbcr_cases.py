"""libjpeg's way from planes to colours, spelt out in numpy."""

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from mgpu_ddp.preprocess.nvjpeg import Planes

Levels = npt.NDArray[np.int64]
SAMPLINGS = {"grey": (0, 0), "4:4:4": (1, 1), "4:2:2": (1, 2), "4:2:0": (2, 2)}
"""(down, across)."""


def upsampled(chroma: Levels, down: int, across: int, height: int, width: int) -> Levels:
    """jdsample.c: h2v1_fancy_upsample and h2v2_fancy_upsample, or plain repetition."""
    if across == 1:
        return chroma
    if chroma.shape[1] <= 2:
        return chroma.repeat(down, axis=0).repeat(across, axis=1)[:height, :width]
    if down == 2:
        above, below = np.vstack([chroma[:1], chroma[:-1]]), np.vstack([chroma[1:], chroma[-1:]])
        rows = np.stack([3 * chroma + above, 3 * chroma + below], axis=1).reshape(-1, chroma.shape[1])
        first, second, shift = 8, 7, 4
    else:
        rows, first, second, shift = chroma, 1, 2, 2
    left, right = np.hstack([rows[:, :1], rows[:, :-1]]), np.hstack([rows[:, 1:], rows[:, -1:]])
    both = np.stack([(3 * rows + left + first) >> shift, (3 * rows + right + second) >> shift], axis=2)
    return both.reshape(len(rows), -1)[:height, :width]


def coloured(luma: Levels, blue: Levels, red: Levels) -> Levels:
    """jdcolor.c: ycc_rgb_convert, (height, width, 3)."""
    blue, red = blue - 128, red - 128
    half = 1 << 15
    channels = (
        luma + ((round(1.402 * 65536) * red + half) >> 16),
        luma + ((-round(0.34414 * 65536) * blue - round(0.71414 * 65536) * red + half) >> 16),
        luma + ((round(1.772 * 65536) * blue + half) >> 16),
    )
    return np.stack(channels, axis=-1).clip(0, 255)


def rgb(planes: Planes, number: int) -> Levels:
    """One image, (height, width, 3)."""
    height, width, down, across = (
        int(column[number]) for column in (planes.heights, planes.widths, planes.down, planes.across)
    )
    data = planes.data.cpu().numpy().astype(np.int64)
    first = int(planes.planes[number, 0])
    luma = data[first : first + height * width].reshape(height, width)
    if across == 0:
        return np.stack([luma] * 3, axis=-1)
    rows, columns = -(-height // down), -(-width // across)
    chroma = (data[start : start + rows * columns].reshape(rows, columns) for start in planes.planes[number, 1:])
    return coloured(luma, *(upsampled(plane, down, across, height, width) for plane in chroma))


def random_planes(sizes: list[tuple[int, int]]) -> Planes:
    """Noise of every sampling at every (height, width)."""
    cases = [(*size, *sampling) for size in sizes for sampling in SAMPLINGS.values()]
    heights, widths, down, across = np.array(cases, dtype=np.int64).T
    planes = Planes.empty(heights, widths, across, down, torch.device("cpu"))
    planes.data.copy_(torch.from_numpy(np.random.default_rng(0).integers(0, 256, len(planes.data), dtype=np.uint8)))
    assert all(later > earlier for earlier, later in pairwise(planes.planes[:, 0]))
    return planes
