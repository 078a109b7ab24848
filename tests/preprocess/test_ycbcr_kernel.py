"""Planes → RGB: the kernel, run by Triton's interpreter, against libjpeg's arithmetic; and that against Pillow."""

import io
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from mgpu_ddp.preprocess import ycbcr_kernel
from mgpu_ddp.preprocess.nvjpeg import Images, Planes
from tests.support import ycbcr_cases as cases

SIZES = [(1, 1), (1, 2), (2, 1), (3, 4), (4, 5), (2, 6), (7, 3), (1, 40), (40, 1), (9, 17), (33, 47)]


def run(planes: Planes) -> Images:
    return ycbcr_kernel.to_rgb(planes)


def test_the_kernel_yields_libjpegs_levels(interpreter: ProcessPoolExecutor) -> None:
    planes = cases.random_planes(SIZES)
    images = interpreter.submit(run, planes).result()
    for number, (start, height, width) in enumerate(zip(images.starts, images.heights, images.widths, strict=True)):
        got = images.data[start : start + 3 * height * width].view(3, height, width).permute(1, 2, 0)
        assert np.array_equal(got.numpy(), cases.rgb(planes, number)), number


@pytest.mark.parametrize("sampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize(("height", "width"), [(48, 80), (47, 79), (36, 20), (16, 5), (16, 4), (1, 64), (2, 2)])
def test_the_arithmetic_is_that_of_pillow(sampling: str, height: int, width: int) -> None:
    """Chroma that is the same all over a block survives encoding, so that its planes are known from outside."""
    down, across = cases.SAMPLINGS[sampling]
    random = np.random.default_rng(height * width)
    blocks = random.integers(0, 256, (-(-height // (8 * down)), -(-width // (8 * across)), 3), dtype=np.uint8)
    pixels = blocks.repeat(8 * down, axis=0).repeat(8 * across, axis=1)[:height, :width]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=100, subsampling=sampling)
    # Before colours are made: luma as it is, and chroma interpolated, which in the corner of a block it is not.
    raw = Image.open(io.BytesIO(file.getvalue()))
    raw.draft("YCbCr", raw.size)
    ycc = np.asarray(raw).astype(np.int64)
    heights, widths, downs, acrosses = (np.array([value]) for value in (height, width, down, across))
    planes = Planes.empty(heights, widths, acrosses, downs, torch.device("cpu"))
    planes.data[: height * width] = torch.from_numpy(ycc[:, :, 0].astype(np.uint8)).flatten()
    for plane in (1, 2):
        rows, columns = (
            np.arange(-(-size // shared)) // 8 * 8 * shared for size, shared in ((height, down), (width, across))
        )
        # The middle of each block, or the last pixel of one that the edge cuts.
        at = np.minimum(rows + 4 * down, height - 1), np.minimum(columns + 4 * across, width - 1)
        start = int(planes.planes[0, plane])
        levels = torch.from_numpy(ycc[np.ix_(*at)][:, :, plane].astype(np.uint8))
        planes.data[start : start + levels.numel()] = levels.flatten()
    want = np.asarray(Image.open(io.BytesIO(file.getvalue())))
    assert np.array_equal(cases.rgb(planes, 0), want)
