"""`batch_size=auto`: one answer for all ranks, measured before the job's first start."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import numpy as np
import torch

from mgpu_ddp.errors import OutOfMemoryError
from mgpu_ddp.job import Job
from mgpu_ddp.keeping import available_bytes, peaks, reset_peaks
from mgpu_ddp.loading import Batch
from mgpu_ddp.manifest import Manifest
from mgpu_ddp.predict import Clock, Predictor, in_flight, predict
from mgpu_ddp.preprocess import Transform
from mgpu_ddp.world import World

log = logging.getLogger("mgpu_ddp")

SMALLEST, LARGEST = 8, 4096
GAIN = 1.03
"""A larger batch must be worth so much: a smaller one commits sooner, and needs less memory."""
MEASURED_S = 1.0
SHARE_OF_MEMORY = 0.5
"""What a batch may take of what is free: its encoded and decoded images come on top of it."""


def find_batch_size(job: Job, transform: Transform, world: World, ready: Callable[[], Predictor]) -> int:
    """The batch size to start the job with. Collective: every rank calls this; all get the same."""
    if job.config.batch_size != "auto":
        return int(job.config.batch_size)
    before: int | None = None
    with world.together("look for the batch size"):
        manifest = Manifest.read(job.run_dir) if world.rank == 0 and not job.starts_over else None
        before = manifest.batch_size if manifest else None
    before = world.share("batch size", before)
    if before is not None:
        return before
    predictor = ready()
    rates: dict[int, float] = {}
    for batch_size in _doubling():
        rate, room = None, False
        with world.together(f"try batches of {batch_size}"):
            rate, room = _measure(predictor, batch_size, transform, world)
        found = world.exchange("rate", [rate, room])
        if any(rate is None for rate, _ in found):
            break
        rates[batch_size] = sum(rate for rate, _ in found)
        log.info("batch_size=auto: %s images/s with %d", f"{rates[batch_size]:,.1f}", batch_size)
        if _flat(list(rates.values())) or not all(room for _, room in found):
            break
    chosen = smallest_near_best(rates)
    log.info("batch_size=auto chose %d", chosen)
    return chosen


def smallest_near_best(rates: dict[int, float]) -> int:
    """The smallest batch size whose rate is within 3 % of the best; the smallest of all where there is no rate."""
    best = max(rates.values(), default=0.0)
    return min((size for size, rate in rates.items() if rate * GAIN >= best), default=SMALLEST)


def _doubling() -> Iterator[int]:
    size = SMALLEST
    while size <= LARGEST:
        yield size
        size *= 2


def _flat(rates: Sequence[float]) -> bool:
    """Whether the last two doublings have brought next to nothing."""
    return len(rates) > 2 and max(rates[-2:]) < GAIN * max(rates[:-2])


def _measure(predictor: Predictor, batch_size: int, transform: Transform, world: World) -> tuple[float | None, bool]:
    """Images/s of this rank's model with batches of one size, None where they do not fit; whether twice as many may."""
    height, width = transform.out_size
    on_gpu = world.device.type == "cuda"
    free = torch.cuda.mem_get_info(world.device)[0] if on_gpu else available_bytes() // world.local_size
    kind = "peak_gpu_bytes" if on_gpu else "peak_host_bytes"
    reset_peaks()
    before = peaks()[kind]
    pixels = torch.randint(0, 256, (batch_size, height, width, 3), dtype=torch.uint8, pin_memory=on_gpu)
    batch = Batch(
        index=np.arange(batch_size),
        label=np.zeros(batch_size, dtype=np.int32),
        pixels=pixels,
        jpegs=None,
        errors={},
        seconds={},
    )
    clock = Clock(warm_up=in_flight(world), began=time.perf_counter())

    def batches() -> Iterator[tuple[Batch, float]]:
        while len(clock.batch_s) < 2 * clock.warm_up or time.perf_counter() - clock.started < MEASURED_S:
            yield batch, 0.0

    try:
        with closing(predict(batches(), predictor, clock, world)) as predicted:
            for _ in predicted:
                pass
    except OutOfMemoryError:
        return None, False
    used = peaks()[kind] - before
    if clock.split_rows or used > SHARE_OF_MEMORY * free:
        return None, False
    rows, seconds = clock.steady
    return rows / seconds, 2 * used < SHARE_OF_MEMORY * free
