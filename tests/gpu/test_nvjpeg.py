"""JPEGs by the engines of a real GPU: every pixel is Pillow's."""

import io
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from mgpu_ddp.inference.cuda_graph import EAGER_STEPS, Replayed
from mgpu_ddp.models.max_pool_kernel import max_pool
from mgpu_ddp.preprocess.jpeg_header import read_header
from mgpu_ddp.preprocess.nvjpeg import Decoder, Files, Images, JpegError, Planes
from mgpu_ddp.preprocess.ycbcr_kernel import to_rgb
from tests.support import resize_cases
from tests.support import ycbcr_cases as cases

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
SIZES = [(1, 1), (2, 2), (2, 3), (3, 4), (5, 5), (9, 17), (1, 64), (64, 1), (251, 333), (375, 500), (767, 1023)]
SIZES += [(3000, 2001)]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(torch.device("cuda", 0))


def encoded(height: int, width: int, sampling: str, quality: int) -> bytes:
    picture = Image.fromarray(resize_cases.picture(height, width, seed=quality).permute(1, 2, 0).numpy())
    file = io.BytesIO()
    if sampling == "grey":
        picture.convert("L").save(file, "JPEG", quality=quality)
    else:
        picture.save(file, "JPEG", quality=quality, subsampling=sampling)
    return file.getvalue()


def decoded(decoder: Decoder, files: Sequence[bytes]) -> Planes:
    headers = [read_header(file) for file in files]
    sizes = np.array([(h.height, h.width, *reversed(h.chroma)) for h in headers if h is not None])
    planes = Planes.empty(*sizes.T, torch.device("cuda", 0))
    buffers = [np.frombuffer(file, dtype=np.uint8) for file in files]
    addresses = np.array([buffer.ctypes.data for buffer in buffers])
    torch.cuda.synchronize()
    where = Files(addresses=addresses, lengths=np.array([len(file) for file in files]))
    decoder.decode(where, planes)
    in_colour = Images.empty(*sizes[:, :2].T, torch.device("cuda", 0))
    decoder.decode(where, in_colour)
    own, theirs = to_rgb(planes).data, in_colour.data
    # nvJPEG's own colours: other chroma between the samples, other rounding.
    print(f"RGB differs by {(own.int() - theirs.int()).abs().float().mean():.2f} levels on average")
    return planes


def test_every_pixel_is_pillows(decoder: Decoder) -> None:
    if not decoder.has_engines:
        pytest.skip("this GPU has no JPEG engines")
    asked = [(*size, name, quality) for size in SIZES for name in cases.SAMPLINGS for quality in (40, 90)]
    files = [encoded(*each) for each in asked]
    images = to_rgb(decoded(decoder, files))
    data = images.data.cpu()
    for number, file in enumerate(files):
        want = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
        height, width = want.shape[:2]
        start = int(images.starts[number])
        got = data[start : start + want.size].view(3, height, width).permute(1, 2, 0).numpy()
        apart = np.abs(got.astype(int) - want)
        assert apart.max() == 0, (asked[number], apart.max(), apart.mean())


def test_the_kernel_yields_libjpegs_levels() -> None:
    planes = cases.random_planes([(1, 1), (3, 4), (4, 5), (9, 17), (301, 203), (375, 500)])
    on_gpu = Planes(data=planes.data.cuda(), **{k: getattr(planes, k) for k in Planes.__slots__ if k != "data"})
    images = to_rgb(on_gpu)
    for number, (start, height, width) in enumerate(zip(images.starts, images.heights, images.widths, strict=True)):
        got = images.data[start : start + 3 * height * width].view(3, height, width).permute(1, 2, 0)
        assert np.array_equal(got.cpu().numpy(), cases.rgb(planes, number)), number


def test_a_refused_file_does_not_spoil_the_next_batch(decoder: Decoder) -> None:
    good = [encoded(375, 500, "4:2:0", quality) for quality in range(50, 60)]
    want = decoded(decoder, good).data[: 10 * 375 * 500].cpu()
    broken = bytearray(good[3])
    middle = broken.index(b"\xff\xda") + 40
    broken[middle : middle + 60] = b"\xff\xd3" * 30
    try:
        decoded(decoder, [*good[:3], bytes(broken)])
    except JpegError as error:
        print(error)
    assert torch.equal(decoded(decoder, good).data[: len(want)].cpu(), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_pooling_is_torchs(dtype: torch.dtype) -> None:
    images = torch.randn(300, 64, 112, 112, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
    images[3, 4, 5, 6] = torch.nan
    want = torch.nn.functional.max_pool2d(images, 3, 2, 1)
    assert torch.equal(max_pool(images, (3, 3), (2, 2), (1, 1)).nan_to_num(7.0), want.nan_to_num(7.0))


@torch.inference_mode()
def test_a_recording_that_gives_other_bits_is_not_used() -> None:
    called = 0

    def step(images: torch.Tensor, _batch_size: int) -> dict[str, torch.Tensor]:
        nonlocal called
        called += 1
        return {"logits": images.sum(dim=(1, 2, 3))[:, None] + called}

    replayed, images = Replayed(step), torch.ones(2, 3, 4, 4, device="cuda")
    for _ in range(2 * EAGER_STEPS):
        before = called
        assert torch.equal(replayed(images, 2)["logits"], torch.full((2, 1), 49.0 + before, device="cuda"))


@torch.inference_mode()
def test_a_recorded_step_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = False
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(14400, 9)
    )
    module = module.cuda().half().to(memory_format=torch.channels_last)
    called = 0

    def step(images: torch.Tensor, batch_size: int) -> dict[str, torch.Tensor]:
        nonlocal called
        called += 1
        return {"logits": torch.cat([module(batch).float() for batch in images.split(batch_size)])}

    replayed = Replayed(step)
    # As the jobs of a sweep over batch sizes come, and then several batches at once.
    for batch_size, together, steps in ((8, 1, 2 * EAGER_STEPS), (16, 1, 2 * EAGER_STEPS), (8, 4, 2 * EAGER_STEPS)):
        called = 0
        for number in range(steps):
            images = torch.randn(batch_size * together, 3, 32, 32, device="cuda").half()
            images = images.contiguous(memory_format=torch.channels_last)
            expected = torch.cat([module(batch).float() for batch in images.split(batch_size)])
            assert torch.equal(replayed(images, batch_size)["logits"], expected), (batch_size, number)
        # Recorded after one more, which tells what a replay must give.
        assert called == EAGER_STEPS + 2
