"""What `auto` finds before a job's first start, one answer for all ranks: `runtime.compile` and `batch_size`."""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch

from mgpu_ddp.config.schema import Config
from mgpu_ddp.data.datasets import open_samples
from mgpu_ddp.distributed.host import available_bytes, peaks, reset_peaks
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import OutOfMemoryError, UsageError, reason_of
from mgpu_ddp.inference.clock import Clock
from mgpu_ddp.inference.pipeline import in_flight, predict
from mgpu_ddp.inference.predictor import Predictor
from mgpu_ddp.job.context import Setup
from mgpu_ddp.job.plan import batch_size_of, dataset_range
from mgpu_ddp.loader.batch import Batch
from mgpu_ddp.models.prepare import operations
from mgpu_ddp.preprocess.transform import Transform

log = logging.getLogger("mgpu_ddp")

SMALLEST, LARGEST = 8, 4096
DEFAULT_BATCH_SIZE = 32
"""Stands for auto until it is found."""
GAIN = 1.03
"""A larger batch must be worth so much: a smaller one commits sooner, and needs less memory."""
MEASURED_S = 1.0
SHARE_OF_MEMORY = 0.5
"""What a batch may take of what is free: its encoded and decoded images come on top of it."""
WORTH_COMPILING = 1e15
"""Floating-point operations from which a job on CPUs is compiled: ResNet18 over 280,000 images. Compiling gains 5 to
17 % of the two hours that they take two cores, and is worth its while up to about sixty-four of them."""


def choose_compile(setup: Setup) -> str:
    """`runtime.compile` as on or off, tried where it is on. Collective: every rank calls this.

    The job's work decides, and nothing that differs between worlds: a compiled model's last bits are its own.

    Raises:
        UsageError: the model does not compile, and is to be.
    """
    asked, world = setup.job.config.runtime.compile, setup.world
    if asked == "off":
        return "off"
    settled: tuple[bool, bool, int | None] | None = None
    with world.together("choose whether to compile"):
        if world.rank == 0:
            settled = _settle_compile(setup)
    compiled, is_free, batch_size = world.share("compile", settled)
    if compiled and batch_size is not None:
        log.info("runtime.compile=%s: the model is compiled now, which takes half a minute the first time", asked)
        predictor = setup.predictors.get(replace(setup.resolved, compile="on"))
        failures = _try_on_all(predictor, batch_size, setup.resolved.transform, world)
        if failures and not is_free:
            raise UsageError(
                f"runtime.compile must be off where the model cannot be compiled, got 'on' ({failures[0]}). Install"
                " what it needs, or set runtime.compile=off, in another folder if this one was begun with on."
            )
        if failures and world.rank == 0:
            log.warning("runtime.compile=auto is off, for the model cannot be compiled: %s", failures[0])
        compiled = not failures
    return "on" if compiled else "off"


def _settle_compile(setup: Setup) -> tuple[bool, bool, int | None]:
    """(whether to compile, whether a failure may change that, the batch size to try, if any). Rank 0 only."""
    job, before = setup.job, setup.before
    config = job.config
    asked_on = config.runtime.compile == "on"
    if before and before.fingerprint.get("runtime.compile") != "on":
        # Where it is asked for nevertheless, the folder is refused when it is claimed.
        return asked_on, False, None
    if not before and not asked_on and not _may_be_compiled(config, setup.world):
        return False, True, None
    length = len(open_samples(config, setup.files))
    start, stop = dataset_range(config, length)
    batch_size = batch_size_of(config, SMALLEST if config.batch_size == "auto" else int(config.batch_size), length)
    if before:
        is_left = not before.complete or stop > before.stop or config.retry_failed
        tried = batch_size if job.batch_size_given else before.batch_size
        return True, False, tried if is_left else None
    work = (stop - start) * operations(setup.model.module, setup.resolved.transform)
    return asked_on or work >= WORTH_COMPILING, not asked_on, batch_size


def _may_be_compiled(config: Config, world: World) -> bool:
    """Whether auto leaves it to the job's work."""
    # On a GPU the folded, fused ResNets are no slower. One shard of several must have the bits of the others.
    return world.device.type == "cpu" and config.strategy == "ddp" and not config.shard and config.batch_size != "auto"


def _try_on_all(predictor: Predictor, batch_size: int, transform: Transform, world: World) -> list[str]:
    """Why ranks cannot predict a batch, for each that cannot. Collective: every rank calls this."""
    # What the first rank of a host compiles, the others find in Inductor's cache.
    failures = []
    for is_turn in (world.local_rank == 0, world.local_rank > 0):
        failure = _failure(predictor, batch_size, transform, world) if is_turn else None
        found = enumerate(world.exchange("compile", failure))
        failures += [f"rank {rank} of {world.size}: {text}" for rank, text in found if text]
    return failures


def _failure(predictor: Predictor, batch_size: int, transform: Transform, world: World) -> str | None:
    """Why this rank cannot predict a batch, None where it can."""
    batch = _noise(batch_size, transform, world)
    try:
        _predict_one(batch, predictor, world)
    except OutOfMemoryError:
        # The job has its own ways with that.
        return None
    except Exception as error:
        # A compiler has much to say, and the cause in its last words.
        reason = reason_of(error).partition(" Set TORCHDYNAMO_VERBOSE")[0]
        return reason if len(reason) < 400 else f"{reason[:150]} ... {reason[-250:]}"
    return None


def find_batch_size(setup: Setup) -> int:
    """The batch size to start the job with. Collective: every rank calls this; all get the same."""
    asked, world, transform = setup.job.config.batch_size, setup.world, setup.resolved.transform
    if asked != "auto":
        return int(asked)
    settled = world.share("batch size", setup.before.batch_size if setup.before else None)
    if settled is not None:
        return int(settled)
    predictor = setup.predictors.get(setup.resolved)
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
    on_gpu = world.device.type == "cuda"
    free = torch.cuda.mem_get_info(world.device)[0] if on_gpu else available_bytes() // world.local_size
    kind = "peak_gpu_bytes" if on_gpu else "peak_host_bytes"
    reset_peaks()
    before = peaks()[kind]
    batch = _noise(batch_size, transform, world)
    clock = Clock(warm_up=in_flight(world), began=time.perf_counter())

    def batches() -> Iterator[tuple[Batch, float]]:
        while len(clock.batch_s) < 2 * clock.warm_up or time.perf_counter() - clock.started < MEASURED_S:
            yield batch, 0.0

    try:
        # The model may have to be compiled for it.
        _predict_one(batch, predictor, world)
        clock.started = time.perf_counter()
        _predict_all(batches(), predictor, clock, world)
    except OutOfMemoryError:
        return None, False
    used = peaks()[kind] - before
    if clock.split_rows or used > SHARE_OF_MEMORY * free:
        return None, False
    rows, seconds = clock.steady
    return rows / seconds, 2 * used < SHARE_OF_MEMORY * free


def _noise(batch_size: int, transform: Transform, world: World) -> Batch:
    shape = (batch_size, *transform.out_size, 3)
    return Batch(
        index=np.arange(batch_size),
        label=np.zeros(batch_size, dtype=np.int32),
        pixels=torch.randint(0, 256, shape, dtype=torch.uint8, pin_memory=world.device.type == "cuda"),
        jpegs=None,
        errors={},
        seconds={},
    )


def _predict_one(batch: Batch, predictor: Predictor, world: World) -> None:
    _predict_all([(batch, 0.0)], predictor, Clock(warm_up=1, began=time.perf_counter()), world)


def _predict_all(batches: Iterable[tuple[Batch, float]], predictor: Predictor, clock: Clock, world: World) -> None:
    with closing(predict(batches, predictor, clock, world)) as predicted:
        for _ in predicted:
            pass
