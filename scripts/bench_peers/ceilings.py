"""The rate of each stage of mgpu_ddp alone, by its own functions and in each way that was tried; prints one JSON line.

generate  FakeData in as many processes as the loader has workers
decode    JPEGs to RGB on the GPU, from bytes that lie in memory: batches of 256 and 512, by this package's decoder
          and by torchvision's, in two and four threads; with --decode-batches nothing else
forward   the prepared model over batches that lie on the device, of --batch-size and twice as many
"""

import argparse
import itertools
import json
import multiprocessing
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch
from torchvision.io import ImageReadMode, decode_jpeg

from mgpu_ddp.config.resolved import Resolved
from mgpu_ddp.config.schema import Config, FakeConfig, FolderConfig, LoaderConfig, ModelConfig, TransformConfig
from mgpu_ddp.data.fake import FakeSamples
from mgpu_ddp.distributed.devices import choose_device
from mgpu_ddp.distributed.host import interrupted_cpus, keep_off
from mgpu_ddp.distributed.world import World, join
from mgpu_ddp.models.build import build_model
from mgpu_ddp.models.prepare import DTYPES, precision_of, prepare, speedups_of
from mgpu_ddp.preprocess.jpeg_header import read_header
from mgpu_ddp.preprocess.nvjpeg import Decoder, Files, Images
from mgpu_ddp.preprocess.transform import imagenet, plain

DECODE_BATCHES, DECODE_THREADS = (256, 512), (2, 4)
DECODED_AHEAD = 8192
"""Different files that are decoded over and over."""
FORWARD_BATCHES = 4
WARM_UP = 0.25
"""The share of the time that comes before it counts."""


def generate(args: argparse.Namespace, workers: int) -> float:
    """FakeData samples per second of all workers together."""
    context = multiprocessing.get_context("fork")
    ready, counts = context.Barrier(workers), context.Queue()
    processes = [
        context.Process(target=_generate, args=(number, workers, args.seconds, ready, counts))
        for number in range(workers)
    ]
    for process in processes:
        process.start()
    rates = [counts.get() for _ in processes]
    for process in processes:
        process.join()
    return sum(rates)


def _generate(number, workers, seconds, ready, counts) -> None:
    torch.set_num_threads(1)
    samples, transform = FakeSamples(FakeConfig(size=2**40)), plain(224)
    ready.wait()

    def steps() -> Generator[int]:
        for index in itertools.count(number, workers):
            samples.load(index, transform, _no_clock)
            yield 1

    counts.put(_rate(steps(), seconds))


def decode(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Files per second by decoder, batch size and number of threads."""
    paths = sorted(Path(args.root).rglob("*.jpg"))[: args.files]
    data = [torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in paths]
    headers = [read_header(path.read_bytes()) for path in paths]
    sizes = np.array([(h.height, h.width) for h in headers if h is not None])
    pinned = torch.cat(data).pin_memory()
    lengths = np.array([len(each) for each in data])
    files = Files(addresses=pinned.data_ptr() + np.cumsum(lengths) - lengths, lengths=lengths)
    decoder = Decoder(device)

    def ours(numbers: np.ndarray) -> None:
        decoder.decode(files[numbers], Images.empty(*sizes[numbers].T, device))

    def torchvisions(numbers: np.ndarray) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            decode_jpeg(data[numbers[0] : numbers[-1] + 1], mode=ImageReadMode.RGB, device=device)

    return {
        f"{step.__name__}, {size} by {threads}": _decode(step, len(data), size, threads, device, args.seconds / 2)
        for step in (ours, torchvisions)
        for size in args.decode_batches or DECODE_BATCHES
        for threads in DECODE_THREADS
    }


def _decode(
    step: Callable[..., None], total: int, size: int, threads: int, device: torch.device, seconds: float
) -> float:
    streams = SimpleQueue()
    for _ in range(threads):
        streams.put(torch.cuda.Stream(device))
    firsts = itertools.cycle(range(0, total - size + 1, size) or [0])

    def one(first: int) -> int:
        stream, numbers = streams.get(), np.arange(first, min(first + size, total))
        with torch.inference_mode(), torch.cuda.device(device), torch.cuda.stream(stream):
            step(numbers)
        streams.put(stream)
        return len(numbers)

    def steps() -> Generator[int]:
        with ThreadPoolExecutor(threads) as pool:
            pending = deque(pool.submit(one, next(firsts)) for _ in range(2 * threads))
            while True:
                yield pending.popleft().result()
                pending.append(pool.submit(one, next(firsts)))

    return _rate(steps(), seconds, lambda: torch.cuda.synchronize(device))


@torch.inference_mode()
def forward(args: argparse.Namespace, batch_size: int, config: Config, world: World) -> float:
    """Images per second of the model alone."""
    resolved = Resolved(
        precision=precision_of(config.runtime, world.device),
        decode="cpu",
        compile="off",
        workers=0,
        collect="gather",
        batch_size=batch_size,
        transform=imagenet(224),
        speedups=speedups_of(config),
    )
    module = prepare(build_model(config), config, resolved, world)
    dtype = DTYPES[resolved.precision]
    inputs = [
        torch.randn(batch_size, 3, 224, 224, device=world.device)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
        for _ in range(FORWARD_BATCHES)
    ]
    on_gpu = world.device.type == "cuda"

    def steps() -> Generator[int]:
        events: deque[torch.cuda.Event] = deque()
        for images in itertools.cycle(inputs):
            module(images)
            if on_gpu:
                # A few batches ahead of the device, so that it never runs dry and the clock is not ahead by much.
                events.append(torch.cuda.Event())
                events[-1].record()
                if len(events) > 4:
                    events.popleft().synchronize()
            yield len(images)

    return _rate(steps(), args.seconds, torch.cuda.synchronize if on_gpu else lambda: None)


def _rate(steps: Generator[int], seconds: float, wait: Callable[[], object] = lambda: None) -> float:
    """Units per second, as the steps count them, once warm."""
    with closing(steps):
        next(steps)
        started = warm_at = time.perf_counter()
        counted, warm = 0, False
        for count in steps:
            counted += count
            now = time.perf_counter()
            if not warm and now - started >= WARM_UP * seconds:
                wait()
                warm, warm_at, counted = True, time.perf_counter(), 0
            elif warm and now - warm_at >= seconds:
                break
        wait()
        return counted / (time.perf_counter() - warm_at)


def _no_clock(_stage: str, _spent_s: float) -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--decode-batches", type=lambda text: [int(size) for size in text.split(",")])
    parser.add_argument("--files", type=int, default=DECODED_AHEAD, help="different files that are decoded")
    parser.add_argument("--seconds", type=float, default=4)
    args = parser.parse_args()

    config = Config(
        data=FolderConfig(root=args.root),
        transform=TransformConfig(),
        model=ModelConfig(weights=None),
        batch_size=args.batch_size,
        loader=LoaderConfig(),
    )
    world = join()
    workers = len(os.sched_getaffinity(0))
    # What forks comes before anything touches CUDA.
    found = {} if args.decode_batches else {"generate": {"alone": generate(args, workers)}}
    world = choose_device(config, world)
    # As where JPEGs are decoded in earnest.
    keep_off(interrupted_cpus(), world.cpus)
    if world.device.type == "cuda":
        found["decode"] = decode(args, world.device)
    if not args.decode_batches:
        sizes = (args.batch_size, 2 * args.batch_size)
        found["forward"] = {f"batches of {size}": forward(args, size, config, world) for size in sizes}
    print(json.dumps({"name": "ceilings", "images_per_s": found, "workers": workers}), flush=True)
    # The heartbeat's and the decoder's threads are no longer needed.
    os._exit(0)


if __name__ == "__main__":
    main()
