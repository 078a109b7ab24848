"""Planes of luma and chroma → RGB for a whole batch in one launch, with libjpeg's own arithmetic.

Chroma of half the size is interpolated with weights of 3/4 and 1/4 along each axis (libjpeg's fancy upsampling,
jdsample.c), and converted with 16 fractional bits (jdcolor.c), so that the levels are Pillow's.

Import this module only where there is a CUDA device: other builds of torch come without Triton.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from mgpu_ddp.preprocess.nvjpeg import Images, Planes
from mgpu_ddp.preprocess.resize_kernel import on_device

TILE = 1024
"""Pixels of one program."""


def to_rgb(planes: Planes) -> Images:
    """Interpolate chroma and convert, on the current stream of the planes' device."""
    device = planes.data.device
    images = Images.empty(planes.heights, planes.widths, device)
    tiles = -(-planes.heights * planes.widths // TILE)
    first = np.cumsum(tiles) - tiles
    sizes = (planes.heights, planes.widths, planes.across, planes.down)
    plan = on_device(np.concatenate([planes.planes, np.stack([*sizes, images.starts, first], axis=1)], axis=1), device)
    owners = on_device(np.repeat(np.arange(len(tiles)), tiles), device)
    with torch.cuda.device(device if planes.data.is_cuda else -1):
        _to_rgb[(len(owners),)](planes.data, images.data, plan, owners, tile=TILE)
    return images


@triton.jit  # type: ignore[untyped-decorator]
def _to_rgb(data: tl.tensor, out: tl.tensor, plan: tl.tensor, owners: tl.tensor, tile: tl.constexpr) -> None:
    plan += tl.load(owners + tl.program_id(0)) * 9
    luma, blue, red = data + tl.load(plan), data + tl.load(plan + 1), data + tl.load(plan + 2)
    height, width = tl.load(plan + 3).to(tl.int32), tl.load(plan + 4).to(tl.int32)
    across, down = tl.load(plan + 5).to(tl.int32), tl.load(plan + 6).to(tl.int32)
    out += tl.load(plan + 7)
    at = (tl.program_id(0) - tl.load(plan + 8).to(tl.int32)) * tile + tl.arange(0, tile)
    inside = at < height * width
    y, x = at // width, at % width
    level = tl.load(luma + at, mask=inside, other=0).to(tl.int32)
    # Grey has no chroma; 128 is none.
    coloured = at < tl.where(across > 0, height * width, 0)
    towards_blue = _chroma(blue, y, x, height, width, down, across, coloured) - 128
    towards_red = _chroma(red, y, x, height, width, down, across, coloured) - 128
    plane = height * width
    tl.store(out + at, _level(level + ((91881 * towards_red + 32768) >> 16)), mask=inside)
    green = level + ((-22554 * towards_blue - 46802 * towards_red + 32768) >> 16)
    tl.store(out + plane + at, _level(green), mask=inside)
    tl.store(out + 2 * plane + at, _level(level + ((116130 * towards_blue + 32768) >> 16)), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _chroma(
    plane: tl.tensor,
    y: tl.tensor,
    x: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    down: tl.tensor,
    across: tl.tensor,
    inside: tl.tensor,
) -> tl.tensor:
    """The chroma of some pixels, int32; 128 where there is none."""
    down, across = tl.maximum(down, 1), tl.maximum(across, 1)
    rows, columns = (height + down - 1) // down, (width + across - 1) // across
    row, column = y // down, x // across
    # libjpeg repeats the samples of images this narrow.
    smooth = columns > 2
    wide, tall = smooth & (across == 2), smooth & (down == 2)
    near_row = tl.minimum(tl.maximum(tl.where(tall, row + (y % 2) * 2 - 1, row), 0), rows - 1)
    near_column = tl.minimum(tl.maximum(tl.where(wide, column + (x % 2) * 2 - 1, column), 0), columns - 1)
    here = _sample(plane + row * columns + column, inside)
    beside = _sample(plane + row * columns + near_column, inside)
    if tall:
        here = 3 * here + _sample(plane + near_row * columns + column, inside)
        beside = 3 * beside + _sample(plane + near_row * columns + near_column, inside)
    # Halves are rounded down and up in turns from pixel to pixel.
    rounding = tl.where(tall, 8 - x % 2, 1 + x % 2)
    shift = tl.where(tall, 4, 2)
    return tl.where(inside, tl.where(wide, (3 * here + beside + rounding) >> shift, here), 128)


@triton.jit  # type: ignore[untyped-decorator]
def _sample(at: tl.tensor, inside: tl.tensor) -> tl.tensor:
    return tl.load(at, mask=inside, other=0).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _level(total: tl.tensor) -> tl.tensor:
    return tl.minimum(tl.maximum(total, 0), 255).to(tl.uint8)
