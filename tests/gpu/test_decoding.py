"""JPEGs decoded on a real GPU: nothing is written before what reads there is done, and what is refused is not lost."""

import threading
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

import torchvision
from PIL import Image

from mgpu_ddp.config.resolved import Resolved
from mgpu_ddp.config.schema import (
    ArrayConfig,
    Config,
    FolderConfig,
    LoaderConfig,
    ModelConfig,
    OutputConfig,
    TransformConfig,
)
from mgpu_ddp.data.array import ArraySamples
from mgpu_ddp.data.files import FileSamples, find_images
from mgpu_ddp.data.listing import Listing
from mgpu_ddp.data.samples import Samples
from mgpu_ddp.distributed.devices import choose_device
from mgpu_ddp.distributed.sharding import Plan, ShardSampler
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import HangError
from mgpu_ddp.inference import gpu_input
from mgpu_ddp.inference.clock import Clock
from mgpu_ddp.inference.cuda_graph import EAGER_STEPS
from mgpu_ddp.inference.gpu_input import GpuInput, Staging, decoder_of
from mgpu_ddp.inference.outputs import SPLIT
from mgpu_ddp.inference.pipeline import held_slots, predict
from mgpu_ddp.inference.predictor import Predictor
from mgpu_ddp.loader import shared_slots
from mgpu_ddp.loader.batch import Batch
from mgpu_ddp.loader.loader import load_batches
from mgpu_ddp.models.prepare import place
from mgpu_ddp.output.rows import Rows, concatenate
from mgpu_ddp.preprocess import resize_kernel
from mgpu_ddp.preprocess.nvjpeg import Decoder
from mgpu_ddp.preprocess.transform import Transform, imagenet
from tests.support.boxed import NUM_IMAGES, boxed
from tests.support.choices import resolved
from tests.support.runs import make_images
from tests.support.sources import open_source

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
COUNT, BATCH_SIZE = 900, 16
DELAY_CYCLES = 20_000_000


@pytest.fixture(scope="module")
def world(world: World) -> World:
    return choose_device(Config(data=FolderConfig(root="."), transform=TransformConfig(), model=ModelConfig()), world)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jpegs")
    make_images(folder, COUNT)
    return folder


def loading(samples: Samples, choices: Resolved, world: World) -> AbstractContextManager[Iterator[Batch]]:
    plan = Plan(
        start=0,
        stop=len(samples),
        size=1,
        batch_size=choices.batch_size,
        contiguous=False,
        # Of several loads, the last of which is not full.
        smallest_rows=25 * choices.batch_size,
        largest_rows=25 * choices.batch_size,
    )
    held = held_slots(choices, world)
    return load_batches(samples, ShardSampler(plan, 0), LoaderConfig(), choices, world, held=held)


SQUARE = imagenet(64)
PORTRAIT = Transform(resize=(70,), crop=(64, 40), interpolation="lanczos", mean=(0.5,) * 3, std=(0.25,) * 3)
"""The parts of a transform that keys can set, with an input that is no square."""


def rows_of(
    root: Path,
    world: World,
    *,
    decode: str = "gpu",
    transform: Transform = SQUARE,
    batch_size: int = BATCH_SIZE,
    samples: Samples | None = None,
) -> tuple[Rows, Clock]:
    config = Config(
        data=FolderConfig(root=str(root)),
        transform=TransformConfig(),
        model=ModelConfig(weights=None),
        output=OutputConfig(fields=["topk", "logits"]),
    )
    samples = samples or FileSamples(str(root), Listing.build(find_images(str(root)).paths))
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = False
    module = torchvision.models.squeezenet1_1(num_classes=12).eval().cuda().half().to(memory_format=torch.channels_last)
    choices = resolved(precision="fp16", decode=decode, workers=2, batch_size=batch_size, transform=transform)
    predictor = Predictor(module, config, choices, world.device)
    assert predictor.decodes == (decode != "cpu")
    clock = Clock(warm_up=1, began=0.0)
    with loading(samples, choices, world) as batches:
        return concatenate(list(predict(batches, predictor, clock, world))), clock


def test_a_late_kernel_reads_what_was_decoded_for_it(root: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    calm, clock = rows_of(root, world)
    assert clock.errors == 0
    assert clock.decode_s > 0
    launch = resize_kernel.preprocess_images

    def late(*args: Any, **kwargs: Any) -> None:
        torch.cuda._sleep(DELAY_CYCLES)
        launch(*args, **kwargs)

    monkeypatch.setattr(resize_kernel, "preprocess_images", late)
    delayed, _ = rows_of(root, world)
    assert np.array_equal(calm.columns["logits"], delayed.columns["logits"])


@pytest.mark.parametrize(
    "transform",
    [
        SQUARE,
        PORTRAIT,
        Transform(resize=(96, 48)),
        Transform(resize=(60, 90), crop=(60, 48), interpolation="bicubic"),
    ],
    ids=str,
)
def test_exact_decoding_gives_the_bits_of_the_cpu(root: Path, world: World, transform: Transform) -> None:
    if not decoder_of(world.device).has_engines:
        pytest.skip("this GPU has no JPEG engines")
    by_cpu, _ = rows_of(root, world, decode="cpu", transform=transform)
    exact, clock = rows_of(root, world, decode="exact", transform=transform)
    assert clock.decode_s > 0
    assert np.array_equal(exact.columns["logits"], by_cpu.columns["logits"])
    quick, _ = rows_of(root, world, decode="gpu", transform=transform)
    apart = np.abs(quick.columns["logits"] - by_cpu.columns["logits"])
    print(f"decode=gpu: logits differ by {apart.mean():.1e} on average, {apart.max():.1e} at most")
    assert apart.max() > 0


@pytest.mark.parametrize("decode", ["gpu", "exact"])
def test_boxes_are_cut_out_of_images_that_are_decoded_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decode: str
) -> None:
    if decode == "exact" and not decoder_of(world.device).has_engines:
        pytest.skip("this GPU has no JPEG engines")
    boxes, sources = boxed(tmp_path, repeat=8)
    samples = open_source(sources["list"], world)
    by_cpu, on_cpu = rows_of(tmp_path, world, decode="cpu", batch_size=len(boxes), samples=samples)
    decoded, decode_some = list[int](), GpuInput._decoded

    def counted(inputs: GpuInput, jpegs: Any, files: Any, numbers: Any, clock: Any) -> Any:
        decoded.append(len(numbers))
        return decode_some(inputs, jpegs, files, numbers, clock)

    monkeypatch.setattr(GpuInput, "_decoded", counted)
    rows, clock = rows_of(tmp_path, world, decode=decode, batch_size=len(boxes), samples=samples)
    assert rows.errors == by_cpu.errors
    assert clock.clipped == on_cpu.clipped > 0
    good = [index for index in range(len(boxes)) if index not in rows.errors]
    logits, wanted = rows.columns["logits"][good], by_cpu.columns["logits"][good]
    assert np.array_equal(logits, wanted) == (decode == "exact")
    assert np.abs(logits - wanted).mean() < 0.1
    # The first pieces are of a few boxes.
    assert NUM_IMAGES - 6 <= sum(decoded) < 0.5 * len(boxes)


@pytest.mark.parametrize("planar", [True, False], ids=["planar", "interleaved"])
@pytest.mark.parametrize(
    ("size", "transform"), [((300, 400), imagenet(224)), ((224, 224), imagenet(224)), ((75, 90), PORTRAIT)], ids=str
)
def test_arrays_are_resized_on_the_gpu_to_the_pixels_of_the_cpu(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
    transform: Transform,
    planar: bool,
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, *size, 3), dtype=np.uint8)
    np.save(tmp_path / "x.npy", pixels.transpose(0, 3, 1, 2) if planar else pixels)
    samples = ArraySamples(ArrayConfig(path=str(tmp_path / "x.npy")))
    # Five images at once, the last one alone.
    monkeypatch.setattr(gpu_input, "COPIED_BYTES", 5 * pixels[0].nbytes)
    inputs = GpuInput(transform, world.device, torch.float16, channels_last=True, exact=False)
    seen = 0
    with loading(samples, resolved(workers=2, batch_size=BATCH_SIZE, transform=transform), world) as batches:
        for batch in batches:
            assert batch.raw
            ready = inputs.make(batch)
            resized = [transform.geometry(Image.fromarray(pixels[index])) for index in batch.index]
            want = transform.normalise(
                torch.from_numpy(np.stack(resized)).to(world.device), dtype=torch.float16, channels_last=True
            )
            got = ready.on_current_stream()
            assert got.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(got[: len(want)], want)
            seen += len(want)
    assert seen == len(pixels)


def photos(folder: Path, count: int) -> Path:
    """Images of which a few fill a portion, stored upright or turned, and one that the workers decode."""
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = random.integers(0, 256, (375, 500, 3), dtype=np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 1 + number % 8
        image = Image.fromarray(pixels).resize((2000, 1500), Image.Resampling.BILINEAR)
        image.save(folder / f"{number:03}.jpg", quality=90, exif=exif, progressive=number == 7)
    return folder


@pytest.mark.parametrize("decode", ["gpu", "exact"])
def test_rows_do_not_depend_on_how_a_batch_is_cut(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decode: str
) -> None:
    if decode == "exact" and not decoder_of(world.device).has_engines:
        pytest.skip("this GPU has no JPEG engines")
    photos(tmp_path, 40)
    whole, _ = rows_of(tmp_path, world, decode=decode)
    # One image in each piece, and two in each call.
    monkeypatch.setattr(shared_slots, "ENCODED_BYTES", 100)
    monkeypatch.setattr(gpu_input, "MAX_DECODED_PIXELS", 7_000_000)
    cut, clock = rows_of(tmp_path, world, decode=decode)
    assert (clock.errors, clock.rows) == (0, 40)
    assert np.array_equal(whole.index, cut.index)
    assert np.array_equal(whole.columns["logits"], cut.columns["logits"])


def test_too_many_images_for_the_memory_are_decoded_in_parts(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos(tmp_path, 40)
    whole, _ = rows_of(tmp_path, world)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    calls, decode = list[int](), GpuInput._decoded

    def counted(inputs: GpuInput, jpegs: Any, files: Any, numbers: Any, clock: Any) -> Any:
        calls.append(len(numbers))
        return decode(inputs, jpegs, files, numbers, clock)

    monkeypatch.setattr(GpuInput, "_decoded", counted)
    # Each of five threads has room for a few images of 9 MB.
    total = torch.cuda.get_device_properties(world.device).total_memory
    room = torch.cuda.memory_reserved() + (150 << 20)
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        few, clock = rows_of(tmp_path, world)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert clock.errors == 0
    assert sum(calls) > 40, "at least one call did not fit"
    assert np.array_equal(whole.columns["logits"], few.columns["logits"])


def test_memory_is_bounded_however_large_a_batch_is(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_input, "MAX_DECODED_PIXELS", 1 << 24)
    photos(tmp_path, 8)
    for number in range(8, 120):
        (tmp_path / f"{number:03}.jpg").symlink_to(tmp_path / f"{number % 7:03}.jpg")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rows, clock = rows_of(tmp_path, world, batch_size=120)
    assert (clock.errors, len(rows.index)) == (0, 120)
    # All of them decoded take 1.1 GB.
    portion = 3 * gpu_input.MAX_DECODED_PIXELS
    assert torch.cuda.max_memory_allocated() - before < (gpu_input.LARGE_PORTIONS + 1) * portion


@contextmanager
def hanging(decoder: Decoder) -> Generator[None]:
    """Block the threads that call the library, as a call that does not return would."""
    over = threading.Event()
    for lane in decoder._lanes:
        lane._thread.submit(over.wait)
    try:
        yield
    finally:
        over.set()


def test_a_decoder_that_hangs_ends_the_job_in_one_line(
    root: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_input, "HANGS_S", 1)
    monkeypatch.setattr(gpu_input, "LOOK_S", 0.2)
    decoder = decoder_of(world.device)
    said = r"nvJPEG hangs: it has not decoded a batch for 1 s\."
    with hanging(decoder), pytest.raises(HangError, match=said):
        rows_of(root, world)
    # What ends the job for another reason must not wait for the decoder either.
    samples = FileSamples(str(root), Listing.build(find_images(str(root)).paths))
    transform = imagenet(64)
    inputs = GpuInput(transform, world.device, torch.float16, channels_last=True, exact=False)
    staging = Staging(inputs)
    choices = resolved(decode="gpu", workers=2, batch_size=BATCH_SIZE, transform=transform)
    with loading(samples, choices, world) as batches, hanging(decoder):
        for batch in batches:
            staging.submit(batch)
        with pytest.raises(HangError, match=said):
            staging.close()
    deadline = time.monotonic() + 60
    while decoder.longest_s and time.monotonic() < deadline:
        time.sleep(0.01)
    rows, clock = rows_of(root, world)
    assert (len(rows.index), clock.errors) == (COUNT, 0)


def test_what_the_decoder_refuses_costs_its_neighbours_nothing(root: Path, world: World, tmp_path: Path) -> None:
    paths = make_images(tmp_path, 40)
    jpegs = [path for path in paths if path.suffix == ".jpg"]
    good, _ = rows_of(tmp_path, world)
    # A restart marker inside the scan: the header is plain, the data is not.
    data = bytearray(jpegs[7].read_bytes())
    middle = data.index(b"\xff\xda") + 40
    data[middle : middle + 60] = b"\xff\xd3" * 30
    jpegs[7].write_bytes(data)
    rows, clock = rows_of(tmp_path, world)
    assert clock.errors <= 1
    hurt = sorted(tmp_path.rglob("*.*")).index(jpegs[7])
    others = np.arange(len(paths)) != hurt
    assert np.array_equal(rows.columns["logits"][others], good.columns["logits"][others])


@pytest.mark.parametrize("together", [1, 4])
@torch.inference_mode()
def test_a_compiled_model_that_is_replayed_gives_the_same_bits(world: World, together: int) -> None:
    config = Config(
        data=FolderConfig(root="."),
        transform=TransformConfig(),
        model=ModelConfig(weights=None),
        output=OutputConfig(fields=["topk", "logits"]),
    )
    torch.manual_seed(0)
    module = torchvision.models.convnext_tiny(num_classes=12).eval()
    choices = resolved(precision="fp16", decode="gpu", compile="on", batch_size=8, transform=SQUARE)
    module = place(module, config, choices, world.device, 12)
    predictor = Predictor(module, config, choices, world.device)
    images = torch.randn(8 * together, 3, 64, 64, device=world.device).half()
    images = images.contiguous(memory_format=torch.channels_last)
    first = predictor(images, 8)["logits"].clone()
    for _ in range(2 * EAGER_STEPS):
        last = predictor(images, 8)["logits"]
    assert last.data_ptr() == predictor(images.flip(0), 8)["logits"].data_ptr(), "it is replayed"
    assert torch.equal(predictor(images, 8)["logits"], first)
    assert torch.equal(predictor(images.flip(0), 8)["logits"].flip(0), first)


@pytest.fixture
def full_precision() -> Generator[None]:
    """Without TF32, torch's default, whose rounding differs between the kernels of different batch sizes."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.usefixtures("full_precision")
def test_a_batch_that_does_not_fit_on_the_gpu_is_split(world: World) -> None:
    config = Config(data=FolderConfig(root="."), transform=TransformConfig(), model=ModelConfig())
    torch.manual_seed(0)
    module = torchvision.models.resnet50().eval().cuda().to(memory_format=torch.channels_last)
    predictor = Predictor(module, config, resolved(transform=imagenet(224)), world.device)
    images = torch.randn(128, 3, 224, 224, device=world.device).contiguous(memory_format=torch.channels_last)
    whole = predictor(images, len(images))
    assert SPLIT not in whole
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(world.device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + (600 << 20)) / total)
    try:
        split = predictor(images, len(images))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert split[SPLIT].all()
    assert torch.allclose(split["topk_prob"], whole["topk_prob"], atol=1e-5)
