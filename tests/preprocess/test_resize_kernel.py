"""The fused kernel, run by Triton's interpreter on the CPU, against Pillow."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as tvf

from mgpu_ddp.config.schema import ArrayConfig, FakeConfig, LoaderConfig
from mgpu_ddp.data.array import ArraySamples
from mgpu_ddp.data.fake import FakeSamples
from mgpu_ddp.data.samples import Samples
from mgpu_ddp.loader.batch import as_batch
from mgpu_ddp.loader.shared_slots import SharedSlots
from mgpu_ddp.loader.worker import BatchMaker, Order
from mgpu_ddp.preprocess import resize_kernel
from mgpu_ddp.preprocess.nvjpeg import Images
from mgpu_ddp.preprocess.transform import Layout, Transform, imagenet, plain
from tests.support import resize_cases as cases
from tests.support.samples import ignore_time

# Up and down, wide and tall; (31, 5) and (40, 9) are what Pillow 13 resizes vertically first.
SIZES = [(1, 1), (1, 7), (9, 1), (8, 8), (5, 6), (31, 5), (13, 17), (40, 9), (9, 23), (6, 12), (12, 11), (16, 16)]


def run(
    images: list[torch.Tensor], orientations: list[int], transform: Transform, out: torch.Tensor, rows: list[int]
) -> torch.Tensor:
    resize_kernel.preprocess_images(cases.packed(images), orientations, transform, out=out, rows=rows)
    return out


def pictures() -> tuple[list[torch.Tensor], list[int]]:
    images = [cases.picture(height, width, seed=i) for i, (height, width) in enumerate(SIZES)]
    return images, [i % 8 + 1 for i in range(len(SIZES))]


@pytest.mark.parametrize(
    ("name", "channels_last"), [*((name, True) for name in cases.transforms(8)), ("imagenet", False)]
)
def test_the_kernel_yields_the_bits_of_the_cpu_path(
    interpreter: ProcessPoolExecutor, name: str, channels_last: bool
) -> None:
    transform = cases.transforms(8)[name]
    images, orientations = pictures()
    if transform.interpolation in ("bicubic", "lanczos"):
        images, orientations = images[5:], orientations[5:]
    want = cases.expected(images, orientations, transform)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.full_like(want, torch.nan, memory_format=layout)
    rows = list(reversed(range(len(images))))
    got = interpreter.submit(run, images, orientations, transform, out, rows).result()[rows]
    largest, mean = cases.difference(got, want, transform)
    print(f"{name}: differs by at most {largest}/255, {mean}/255 on average")
    assert (largest, mean) == (0, 0)
    assert torch.equal(got, want)


def run_windows(
    images: list[torch.Tensor], orientations: list[int], transform: Transform, windows: Any
) -> torch.Tensor:
    out = torch.full((3 * len(images), 3, *transform.out_size), torch.nan)
    numbers = np.repeat(np.arange(len(images)), 3)
    turned, each = np.array(orientations)[numbers], cases.packed(images)[numbers]
    resize_kernel.preprocess_images(each, turned, transform, out=out, rows=range(len(out)), windows=windows)
    return out


@pytest.mark.parametrize("name", ["imagenet", "padded", "nearest", "lanczos", "tall"])
def test_windows_of_one_image_have_the_bits_of_its_crops(interpreter: ProcessPoolExecutor, name: str) -> None:
    transform, (images, orientations) = cases.transforms(8)[name], pictures()
    packed = cases.packed(images)
    windows = np.stack([cases.windows(packed, orientations, number) for number in range(3)], axis=1)
    crops = [
        cases.oracle(image, orientation, transform, window)
        for image, orientation, mine in zip(images, orientations, windows.tolist(), strict=True)
        for window in mine
    ]
    want = transform.normalise(torch.stack(crops), dtype=torch.float32, channels_last=False)
    got = interpreter.submit(run_windows, images, orientations, transform, windows.reshape(-1, 4)).result()
    assert torch.equal(got, want)


@pytest.mark.parametrize("window", [(-1, 0, 2, 2), (0, 0, 7, 2), (0, 0, 2, 6), (3, 0, 3, 2), (0, 3, 2, 2)])
def test_windows_outside_of_their_image_are_refused(window: tuple[int, ...]) -> None:
    good, out = cases.packed([torch.zeros(3, 5, 6, dtype=torch.uint8)]), torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match="windows must lie inside"):
        resize_kernel.preprocess_images(good, [1], plain(8), out=out, rows=[0], windows=np.array([window]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(interpreter: ProcessPoolExecutor, dtype: torch.dtype) -> None:
    transform, images = imagenet(8), [cases.picture(9, 14, seed=0)]
    out = torch.zeros(1, 3, 8, 8, dtype=dtype)
    got = interpreter.submit(run, images, [6], transform, out, [0]).result()
    assert torch.equal(got, cases.expected(images, [6], transform).to(dtype))


def test_an_image_has_the_same_bits_alone_and_in_a_batch(interpreter: ProcessPoolExecutor) -> None:
    transform = imagenet(8)
    images, orientations = pictures()
    rows, out = list(range(1, len(images) + 1)), torch.full((len(images) + 2, 3, 8, 8), 7.0)
    together = interpreter.submit(run, images, orientations, transform, out, rows).result()
    for i in (0, 6):
        out = torch.zeros(1, 3, 8, 8)
        alone = interpreter.submit(run, images[i : i + 1], orientations[i : i + 1], transform, out, [0]).result()
        assert torch.equal(alone[0], together[rows[i]])
    # Rows that nobody names stay as they are.
    assert (together[[0, -1]] == 7).all()


def run_in_parts(*arguments: Any) -> torch.Tensor:
    resize_kernel.LAUNCHED = 5
    try:
        return run(*arguments)
    finally:
        resize_kernel.LAUNCHED = 65_535


def test_more_images_than_one_launch_holds_take_several(interpreter: ProcessPoolExecutor) -> None:
    transform = cases.transforms(8)["imagenet"]
    images, orientations = pictures()
    want = cases.expected(images, orientations, transform)
    arguments = images, orientations, transform, torch.full_like(want, torch.nan), list(range(len(images)))
    assert torch.equal(interpreter.submit(run_in_parts, *arguments).result(), want)


def test_no_images_are_no_work() -> None:
    resize_kernel.preprocess_images(cases.packed([]), [], plain(8), out=torch.zeros(0, 3, 8, 8), rows=[])


def test_what_the_kernel_could_not_hold_is_refused() -> None:
    image, transform, out = torch.zeros(3, 5, 6, dtype=torch.uint8), plain(8), torch.zeros(2, 3, 8, 8)
    good = cases.packed([image])
    for images, orientations, rows, into in [
        (replace(good, data=good.data.float()), [1], [0], out),
        (replace(good, data=good.data[::2]), [1], [0], out),
        (replace(good, data=good.data[:-1]), [1], [0], out),
        (replace(good, data=good.data.view(3, -1)), [1], [0], out),
        (replace(good, starts=good.starts - 1), [1], [0], out),
        (replace(good, starts=good.starts + 1), [1], [0], out),
        (replace(good, widths=good.widths * 0), [1], [0], out),
        (replace(good, heights=-good.heights), [1], [0], out),
        (good, [0], [0], out),
        (good, [9], [0], out),
        (good, [1, 1], [0], out),
        (good, [1], [2], out),
        (good, [1], [-1], out),
        (good, [1], [0], out[:, :, :7]),
        (good, [1], [0], out.to(torch.uint8)),
    ]:
        with pytest.raises(ValueError, match=r"must be|must have|must lie|do not pair"):
            resize_kernel.preprocess_images(images, orientations, transform, out=into, rows=rows)


def test_a_photo_is_shrunk_to_the_levels_of_pillow(interpreter: ProcessPoolExecutor) -> None:
    transform, images = imagenet(32), [cases.picture(300, 400, seed=1)]
    got = interpreter.submit(run, images, [1], transform, torch.zeros(1, 3, 32, 32), [0]).result()
    assert torch.equal(got, cases.expected(images, [1], transform))


@pytest.mark.parametrize("name", cases.transforms(224))
def test_sizes_and_corners_are_torchvisions(name: str) -> None:
    transform = cases.transforms(224)[name]
    sizes = [*np.random.default_rng(3).integers(1, 3000, (300, 2)).tolist(), [256, 257], [257, 256], [1, 5000]]
    # No pixel is touched here.
    heights, widths = np.array(sizes, dtype=np.int64).T
    images = Images(data=torch.zeros(1, dtype=torch.uint8), starts=heights * 0, heights=heights, widths=widths)
    fields = resize_kernel._plan(images, [1] * len(sizes), transform, range(len(sizes)), num_rows=len(sizes))
    for (height, width), (resized_height, resized_width, top, left) in zip(sizes, fields[:, 6:10], strict=True):
        want = tvf._compute_resized_output_size((height, width), list(transform.resize))
        assert [resized_height, resized_width] == want
        for corner, size, crop in zip((top, left), want, transform.out_size, strict=True):
            to, source = cases.centre(size, crop, transform)
            assert corner == source.start - to.start


def run_on_pixels(
    pixels: torch.Tensor, transform: Transform, out: torch.Tensor, orientations: list[int] | None = None
) -> torch.Tensor:
    images, n = Images.of(pixels), len(pixels)
    resize_kernel.preprocess_images(images, orientations or [1] * n, transform, out=out, rows=range(n))
    return out


@pytest.mark.parametrize("planar", [True, False], ids=["planar", "interleaved"])
@pytest.mark.parametrize("source", ["array", "fake"])
def test_what_a_worker_leaves_as_it_is_becomes_what_it_would_have_made_of_it(
    interpreter: ProcessPoolExecutor, tmp_path: Path, source: str, planar: bool
) -> None:
    transform = imagenet(16)
    if source == "array":
        pixels = np.random.default_rng(0).integers(0, 256, (5, 30, 22, 3), dtype=np.uint8)
        np.save(tmp_path / "x.npy", pixels.transpose(0, 3, 1, 2) if planar else pixels)
        samples: Samples = ArraySamples(ArrayConfig(path=str(tmp_path / "x.npy")))
        assert samples.layout == Layout(height=30, width=22, planar=planar)
    else:
        samples = FakeSamples(FakeConfig(size=5, image_size=[3, 30, 22]))
        assert samples.layout == Layout(height=30, width=22, planar=True)
    left = transform.without_geometry((30, 22))
    # A fake image fits into a slot of either kind.
    slots = SharedSlots(1, 4, (30, 22, 3), planar=planar)
    worker = BatchMaker(samples, left, slots, LoaderConfig())
    batch = as_batch(worker.make(Order(slot=0, indices=[1, 2, 4])), slots, raw=True)
    assert batch.pixels.shape == (4, 30, 22, 3)
    out = torch.full((4, 3, 16, 16), torch.nan)
    got = interpreter.submit(run_on_pixels, batch.pixels, transform, out).result()
    made = [samples.load(index, transform, ignore_time)[0] for index in (1, 2, 4)]
    want = np.stack([*made, np.zeros((16, 16, 3), np.uint8)])
    assert torch.equal(got, transform.normalise(torch.from_numpy(want), dtype=torch.float32, channels_last=False))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_interleaved_pixels_turn_as_planes_do(interpreter: ProcessPoolExecutor, orientation: int) -> None:
    transform, image = imagenet(8), cases.picture(9, 14, seed=0)
    out = torch.full((1, 3, 8, 8), torch.nan)
    pixels = image.permute(1, 2, 0)[None].contiguous()
    got = interpreter.submit(run_on_pixels, pixels, transform, out, [orientation]).result()
    assert torch.equal(got, cases.expected([image], [orientation], transform))


@pytest.mark.parametrize("name", cases.transforms(8))
def test_pixels_that_have_their_size_are_only_normalised(interpreter: ProcessPoolExecutor, name: str) -> None:
    transform = cases.transforms(8)[name]
    height, width = transform.out_size
    pixels = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8)
    out = torch.full((2, 3, height, width), torch.nan)
    got = interpreter.submit(run_on_pixels, pixels, transform.without_geometry((height, width)), out).result()
    assert torch.equal(got, transform.normalise(pixels, dtype=torch.float32, channels_last=False))
