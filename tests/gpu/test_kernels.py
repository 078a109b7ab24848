"""The fused kernel on a real GPU, against Pillow, at every size."""

import numpy as np
import pytest
import torch

from mgpu_ddp.preprocess.resize_kernel import preprocess_images
from mgpu_ddp.preprocess.transform import Transform, imagenet, plain
from tests.support import resize_cases as cases

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(500)]
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

SIZES = [(1, 1), (1, 60), (60, 1), (2, 3), (17, 224), (224, 224), (256, 256), (375, 500), (500, 375), (1200, 301)]
SIZES += [(301, 1200), (96, 64), (1333, 2000), (3000, 2000), (4000, 6000), (255, 257)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def run(
    images: list[torch.Tensor],
    orientations: list[int],
    transform: Transform,
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
) -> torch.Tensor:
    """The rows of a batch, in the images' order, though they are written in reverse."""
    out = torch.full((len(images), 3, *transform.out_size), torch.nan, dtype=dtype, device="cuda")
    out = out.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    rows = list(reversed(range(len(images))))
    preprocess_images(cases.packed(images, "cuda"), orientations, transform, out=out, rows=rows)
    return out[rows]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", cases.transforms(224))
def test_the_kernel_yields_the_levels_of_the_cpu_path(name: str, channels_last: bool) -> None:
    transform = cases.transforms(224)[name]
    images = [cases.picture(height, width, seed=i) for i, (height, width) in enumerate(SIZES)]
    orientations = [i % 8 + 1 for i in range(len(images))]
    want = cases.expected(images, orientations, transform)
    got = run(images, orientations, transform, channels_last=channels_last).cpu()
    apart = [cases.difference(got[i : i + 1], want[i : i + 1], transform) for i in range(len(images))]
    for size, (largest, mean) in zip(SIZES, apart, strict=True):
        print(f"{name} {size}: at most {largest:.3g}/255, {mean:.3g}/255 on average")
    # A level is whole; what is left is the last bit of normalising on a GPU.
    assert max(largest for largest, _ in apart) < 1e-3


@pytest.mark.parametrize("name", cases.transforms(224))
def test_windows_have_the_levels_of_the_cpu_path(name: str) -> None:
    transform = cases.transforms(224)[name]
    images = [cases.picture(height, width, seed=i) for i, (height, width) in enumerate(SIZES)]
    orientations = [i % 8 + 1 for i in range(len(images))]
    numbers, packed = np.repeat(np.arange(len(images)), 4), cases.packed(images, "cuda")
    windows = np.stack([cases.windows(packed, orientations, number) for number in range(4)], axis=1).reshape(-1, 4)
    fits = [transform.may_resize(right - left, bottom - top) for left, top, right, bottom in windows.tolist()]
    numbers, windows = numbers[fits], windows[fits]
    turned = np.array(orientations)[numbers]
    crops = [cases.oracle(images[i], orientations[i], transform, w) for i, w in zip(numbers, windows, strict=True)]
    want = transform.normalise(torch.stack(crops), dtype=torch.float32, channels_last=False)
    out = torch.full((len(numbers), 3, *transform.out_size), torch.nan, device="cuda")
    preprocess_images(packed[numbers], turned, transform, out=out, rows=range(len(out)), windows=windows)
    assert cases.difference(out.cpu(), want, transform)[0] < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_are_those_of_normalising_on_the_gpu(dtype: torch.dtype) -> None:
    transform = imagenet(224)
    images = [cases.picture(height, width, seed=i) for i, (height, width) in enumerate(SIZES[5:12])]
    pixels = torch.stack([cases.oracle(image, 1, transform) for image in images]).cuda()
    want = transform.normalise(pixels, dtype=dtype, channels_last=True)
    assert torch.equal(run(images, [1] * len(images), transform, dtype=dtype), want)


@pytest.mark.parametrize(("height", "width"), [(1, 5000), (5000, 1)])
def test_a_strip_is_stretched(height: int, width: int) -> None:
    transform, images = plain(224), [cases.picture(height, width, seed=0)]
    want = cases.expected(images, [1], transform)
    assert cases.difference(run(images, [1], transform).cpu(), want, transform)[0] < 1e-3
    # The CPU path refuses to blow one up to its shorter side; the kernel needs no memory for it.
    assert run(images, [1], imagenet(224)).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_has_the_same_bits_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    transform = imagenet(224)
    images = [cases.picture(height, width, seed=i) for i, (height, width) in enumerate(SIZES)]
    orientations = [i % 8 + 1 for i in range(len(images))]
    rows = run(images, orientations, transform, dtype=dtype)
    assert torch.equal(rows, run(images, orientations, transform, dtype=dtype))
    for i in range(len(images)):
        alone = run(images[i : i + 1], orientations[i : i + 1], transform, dtype=dtype)
        assert torch.equal(alone[0], rows[i])


def test_a_side_stream_gives_the_same_bits() -> None:
    transform, images = imagenet(224), [cases.picture(375, 500, seed=i) for i in range(8)]
    want = run(images, [1] * 8, transform)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        rows = [run(images, [1] * 8, transform) for _ in range(20)]
    stream.synchronize()
    assert all(torch.equal(each, want) for each in rows)
