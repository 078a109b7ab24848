"""Resize, crop and normalise a whole batch of images of any size in one launch, with Pillow's own arithmetic.

Pillow resizes in two passes, one per axis, with weights of 22 fractional bits, and rounds to uint8 after each
(Pillow, src/libImaging/Resample.c). The kernel does the same in integers, so that it yields the very levels of
`Transform.geometry`, and looks up the value that `Transform.normalise` gives each level. Nothing in it depends on the
other images of the batch.

Each thread holds a few output pixels and loops over their taps in both directions. A sum of the first pass is computed
again for every output pixel that needs it, two (bilinear), four (bicubic) or six (lanczos) times: cheaper than to store
it.

Import this module only where there is a CUDA device: other builds of torch come without Triton.
"""

import functools
from collections.abc import Sequence

import numpy as np
import PIL
import torch
import triton
import triton.language as tl

from mgpu_ddp.preprocess.nvjpeg import Images
from mgpu_ddp.preprocess.transform import Integers, Transform

RADIUS = {"nearest": 0, "bilinear": 1, "bicubic": 2, "lanczos": 3}
"""How far a filter reaches, in pixels of the coarser of the two images."""
TILE_ROWS, TILE_COLUMNS, WARPS = 8, 32, 1
"""Output pixels of one program. With one warp a thread owns a column of the tile, so that a weight once computed serves
all of its rows and channels."""
PILLOW_REORDERS = int(PIL.__version__.split(".")[0]) >= 13
"""Pillow 13 resizes vertically first where that saves time, which moves a level by one here and there."""
MAX_BYTES = 2**31
"""Offsets inside one image are 32 bits wide."""
LAUNCHED = 65_535
"""Images of one launch: a grid has no more. Source: CUDA C++ Programming Guide, compute capabilities."""


def preprocess_images(
    images: Images,
    orientations: Sequence[int] | Integers,
    transform: Transform,
    *,
    out: torch.Tensor,
    rows: Sequence[int] | Integers,
    windows: Integers | None = None,
) -> None:
    """Turn decoded images into rows of model input, on the current stream of `out`'s device.

    `orientations` are EXIF's, 1 to 8, applied first. Of the upright image, only what `windows` (n, 4) says counts, as
    left, top, right and bottom. Image i becomes row `rows[i]` of `out`
    (n, 3, *transform.out_size), contiguous or channels_last, of any floating dtype; other rows stay as they are. Images
    that another stream made must be ready, and stay allocated until this stream has read them (`record_stream`).

    Raises:
        ValueError: an image, an orientation, a window, a row or `out` is not as described.
    """
    _check(images, transform, out)
    if not len(images):
        return
    fields = on_device(_plan(images, orientations, transform, rows, windows, num_rows=len(out)), out.device)
    height, width = transform.out_size
    table = _levels(transform, out.dtype, out.device)
    with torch.cuda.device(out.device if out.is_cuda else -1):
        for part in fields.split(LAUNCHED):
            grid = (triton.cdiv(width, TILE_COLUMNS), triton.cdiv(height, TILE_ROWS), len(part))
            _preprocess[grid](
                out,
                table,
                part,
                height,
                width,
                *out.stride(),
                radius=RADIUS[transform.interpolation],
                tile_rows=TILE_ROWS,
                tile_columns=TILE_COLUMNS,
                num_warps=WARPS,
                num_stages=1,
            )


def on_device(numbers: Integers, device: torch.device) -> torch.Tensor:
    """Copy numbers to the device, for a kernel on the current stream."""
    staged = torch.empty(numbers.shape, dtype=torch.int64, pin_memory=device.type == "cuda")
    staged.numpy()[:] = numbers
    return staged.to(device, non_blocking=True)


def _check(images: Images, transform: Transform, out: torch.Tensor) -> None:
    # The kernel takes bare addresses: with wrong ones it would read or write outside the tensors.
    shape, expected = tuple(out.shape), (len(out), 3, *transform.out_size)
    if shape != expected or not out.is_floating_point():
        raise ValueError(f"out must be floating point {expected}, got {out.dtype} {shape}")
    data, sizes = images.data, 3 * images.heights * images.widths
    if data.dtype != torch.uint8 or data.device != out.device or data.dim() != 1 or not data.is_contiguous():
        raise ValueError(f"images must be contiguous uint8 (bytes,) on {out.device}, got {data.dtype} {data.device}")
    if not ((images.heights > 0) & (images.widths > 0) & (sizes < MAX_BYTES)).all():
        raise ValueError(f"images must have pixels, and under {MAX_BYTES} bytes each")
    if not ((images.starts >= 0) & (images.starts + sizes <= len(data))).all():
        raise ValueError(f"images must lie inside their {len(data)} bytes")


def _plan(
    images: Images,
    orientations: Sequence[int] | Integers,
    transform: Transform,
    rows: Sequence[int] | Integers,
    windows: Integers | None = None,
    *,
    num_rows: int,
) -> Integers:
    """Each image's fields for the kernel, int64 (n, 12), in the order in which `_preprocess` loads them."""
    orientation, row = np.asarray(orientations, dtype=np.int64), np.asarray(rows, dtype=np.int64)
    if not orientation.shape == row.shape == images.starts.shape:
        raise ValueError(f"{len(images)} images, {len(orientations)} orientations and {len(rows)} rows do not pair")
    if not ((orientation >= 1) & (orientation <= 8)).all():
        raise ValueError(f"orientations must be 1 to 8, got {orientations}")
    if not ((row >= 0) & (row < num_rows)).all():
        raise ValueError(f"rows must be rows of out, 0 to {num_rows - 1}, got {rows}")
    first, down, across, plane = _steps(images, orientation)
    upright = np.where(orientation >= 5, (images.widths, images.heights), (images.heights, images.widths))
    if windows is not None:
        left, top, right, bottom = windows.T
        if not ((left >= 0) & (top >= 0) & (left < right) & (top < bottom)).all() or (windows.T[:1:-1] > upright).any():
            raise ValueError("windows must lie inside their images, and hold pixels")
        first, upright = first + top * down + left * across, np.stack([bottom - top, right - left])
    resized, corner = transform.placed(upright)
    # As Pillow decides, from 13.0 on.
    less_height, less_width = upright - resized
    vertical_first = (less_height > 0) & (less_height > 2 * less_width) & PILLOW_REORDERS
    fields = (images.data.data_ptr() + first, down, across, plane, *upright, *resized, *corner, vertical_first, row)
    return np.stack(fields, axis=1)


def _steps(images: Images, orientation: Integers) -> tuple[Integers, Integers, Integers, Integers]:
    """Where upright pixels are stored: pixel (y, x) of channel c at byte first + y * down + x * right + c * plane.

    Source: EXIF 2.32, tag 0x0112.
    """
    height, width = images.heights, images.widths
    step, plane = (3, np.ones_like(height)) if images.interleaved else (1, height * width)
    from_right, from_bottom = np.isin(orientation, (2, 3, 7, 8)), np.isin(orientation, (3, 4, 6, 7))
    across, along = step * np.where(from_right, -1, 1), step * np.where(from_bottom, -width, width)
    corner = step * (np.where(from_right, width - 1, 0) + np.where(from_bottom, (height - 1) * width, 0))
    turned = orientation >= 5
    return images.starts + corner, np.where(turned, across, along), np.where(turned, along, across), plane


@functools.lru_cache(maxsize=16)
def _levels(transform: Transform, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The normalised value of each uint8 level of each channel, (3, 256), bitwise `Transform.normalise`'s here."""
    pixels = torch.arange(256, dtype=torch.uint8, device=device).view(1, 1, 256, 1).expand(1, 1, 256, 3)
    table = transform.normalise(pixels, dtype=dtype, channels_last=False).view(3, 256)
    if device.type == "cuda":
        # The next call may read it on another stream.
        torch.cuda.current_stream(device).synchronize()
    return table


@triton.jit  # type: ignore[untyped-decorator]
def _preprocess(
    out: tl.tensor,
    table: tl.tensor,
    plan: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    out_image: tl.tensor,
    out_channel: tl.tensor,
    out_row: tl.tensor,
    out_column: tl.tensor,
    radius: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    plan += tl.program_id(2) * 12
    pixels = tl.load(plan).to(tl.pointer_type(tl.uint8))
    down, right, plane = tl.load(plan + 1).to(tl.int32), tl.load(plan + 2).to(tl.int32), tl.load(plan + 3)
    in_height, in_width = tl.load(plan + 4).to(tl.int32), tl.load(plan + 5).to(tl.int32)
    resized_height, resized_width = tl.load(plan + 6).to(tl.int32), tl.load(plan + 7).to(tl.int32)
    top, left = tl.load(plan + 8).to(tl.int32), tl.load(plan + 9).to(tl.int32)
    vertical_first, row = tl.load(plan + 10), tl.load(plan + 11)

    # Threads past an edge repeat the last pixel and store the same value there.
    y = tl.minimum(tl.program_id(1) * tile_rows + tl.arange(0, tile_rows)[:, None], height - 1)
    x = tl.minimum(tl.program_id(0) * tile_columns + tl.arange(0, tile_columns)[None, :], width - 1)
    taps_y = _taps(y + top, in_height, resized_height, down, radius)
    taps_x = _taps(x + left, in_width, resized_width, right, radius)
    if vertical_first != 0:
        red, green, blue = _resample(pixels, plane, taps_y, taps_x, radius)
    else:
        red, green, blue = _resample(pixels, plane, taps_x, taps_y, radius)

    # Where the resized image does not reach, a centre crop pads with zeros.
    inside = (y + top >= 0) & (y + top < resized_height) & (x + left >= 0) & (x + left < resized_width)
    out += row * out_image + (y * out_row + x * out_column)
    tl.store(out, tl.load(table + tl.where(inside, red, 0)))
    tl.store(out + out_channel, tl.load(table + 256 + tl.where(inside, green, 0)))
    tl.store(out + 2 * out_channel, tl.load(table + 512 + tl.where(inside, blue, 0)))


@triton.jit  # type: ignore[untyped-decorator]
def _resample(pixels: tl.tensor, plane: tl.tensor, inner: tl.tuple, outer: tl.tuple, radius: tl.constexpr) -> tl.tuple:
    """Weigh the taps of the first pass inside those of the second, and round after each: levels of three channels."""
    half = inner[0] * 0 + outer[0] * 0 + (1 << 21)
    red, green, blue = half, half, half
    for i in range(outer[1]):
        line, weight = _offset(outer, i), _weight(outer, i, radius)
        inner_red, inner_green, inner_blue = half, half, half
        for j in range(inner[1]):
            at, inner_weight = pixels + (line + _offset(inner, j)), _weight(inner, j, radius)
            inner_red += inner_weight * tl.load(at).to(tl.int32)
            inner_green += inner_weight * tl.load(at + plane).to(tl.int32)
            inner_blue += inner_weight * tl.load(at + 2 * plane).to(tl.int32)
        red += weight * _level(inner_red)
        green += weight * _level(inner_green)
        blue += weight * _level(inner_blue)
    return _level(red), _level(green), _level(blue)


@triton.jit  # type: ignore[untyped-decorator]
def _level(total: tl.tensor) -> tl.tensor:
    return tl.minimum(tl.maximum(total >> 22, 0), 255)


@triton.jit  # type: ignore[untyped-decorator]
def _taps(at: tl.tensor, in_size: tl.tensor, out_size: tl.tensor, stride: tl.tensor, radius: tl.constexpr) -> tl.tuple:
    """The input pixels that make the output pixels `at` along one axis.

    Returns (the first, how many, its distance from the centre and that of two neighbours in units of the filter, the
    factor that makes the weights add up to 2**22, the axis's length, its stride).
    """
    at = tl.minimum(tl.maximum(at, 0), out_size - 1)
    length, pixels = in_size.to(tl.float64), out_size.to(tl.float64)
    if radius == 0:
        # Pillow goes from pixel to pixel by adding (ImagingScaleAffine), and its rounding errors decide ties.
        step = length / pixels
        centre = at.to(tl.float64) * 0 + 0.5 * step
        for i in range(out_size):
            centre += tl.where(i < at, step, 0)
        first, count = centre.to(tl.int32), 1
        start, total = centre * 0, centre * 0 + 1
    else:
        # In whole numbers of 1 / (2 * out_size) input pixels, so that only a tap that weighs nothing can come or go.
        centre, coarser = (2 * at + 1).to(tl.float64) * length, tl.maximum(length, pixels)
        window = tl.maximum(centre - 2 * radius * coarser + pixels, 0)
        # An axis that keeps its size takes one tap, whose weight is the whole.
        same = in_size == out_size
        first = tl.where(same, at, (window * (0.5 / pixels)).to(tl.int32))
        count = tl.where(same, 1, tl.ceil(2 * radius * coarser / pixels).to(tl.int32))
        start, step = ((2 * first + 1) * pixels - centre) * (0.5 / coarser), pixels / coarser
        total = start * 0
        for i in range(count):
            total += tl.where(first + i < in_size, _filter(start + i * step, radius), 0)
    return first, count, start, step, 4194304 / total, in_size, stride


@triton.jit  # type: ignore[untyped-decorator]
def _offset(taps: tl.tuple, i: tl.tensor) -> tl.tensor:
    """The offset of tap i; past the image's edge, where it weighs nothing, that of the last pixel."""
    return tl.minimum(taps[0] + i, taps[5] - 1) * taps[6]


@triton.jit  # type: ignore[untyped-decorator]
def _weight(taps: tl.tuple, i: tl.tensor, radius: tl.constexpr) -> tl.tensor:
    """Tap i's weight as Pillow computes it: 22 fractional bits, halves rounded away from zero."""
    weight = _filter(taps[2] + i * taps[3], radius) * taps[4]
    rounded = (weight + tl.where(weight < 0, -0.5, 0.5)).to(tl.int32)
    return tl.where(taps[0] + i < taps[5], rounded, 0)


@triton.jit  # type: ignore[untyped-decorator]
def _filter(distance: tl.tensor, radius: tl.constexpr) -> tl.tensor:
    """The triangle, the cubic with a = -0.5, or the sinc windowed by one three times as wide, float64."""
    t = tl.abs(distance)
    if radius == 0:
        weight = t * 0 + 1
    elif radius == 1:
        weight = tl.maximum(1 - t, 0)
    elif radius == 3:
        angle = tl.maximum(t, 1e-30) * 3.141592653589793
        weight = tl.where(t < 3, tl.sin(angle) / angle * (tl.sin(angle / 3) / (angle / 3)), 0)
    else:
        near = (1.5 * t - 2.5) * t * t + 1
        far = (((t - 5) * t + 8) * t - 4) * -0.5
        weight = tl.where(t < 1, near, tl.where(t < 2, far, 0))
    return weight
