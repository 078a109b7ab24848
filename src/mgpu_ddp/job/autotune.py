"""Resolves `runtime.compile` and `batch_size` by trying the model, before a job's first start."""

import logging
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from mgpu_ddp.config.resolved import Resolved
from mgpu_ddp.config.schema import Config, dataset_range
from mgpu_ddp.data.datasets import open_samples
from mgpu_ddp.data.listing import Listing
from mgpu_ddp.distributed.host import available_bytes, peaks, reset_peaks
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import OutOfMemoryError, UsageError, reason_of
from mgpu_ddp.inference.clock import Clock
from mgpu_ddp.inference.pipeline import in_flight, predict
from mgpu_ddp.inference.predictor import Predictor
from mgpu_ddp.job.context import Setup
from mgpu_ddp.job.plan import batch_size_of
from mgpu_ddp.loader.batch import Batch
from mgpu_ddp.models.compile_cache import note_compiled, was_compiled
from mgpu_ddp.models.operations import operations
from mgpu_ddp.output.rows import Rows
from mgpu_ddp.preprocess.transform import AnyTransform, TensorInput

log = logging.getLogger("mgpu_ddp")

SMALLEST, LARGEST = 8, 4096
DEFAULT_BATCH_SIZE = 32
"""Stands for auto until it is found."""
GAIN = 1.03
"""A larger batch must be worth so much: a smaller one commits sooner, and needs less memory."""
MEASURED_S = 1.0
SHARE_OF_MEMORY = 0.5
"""A batch may take so much of the free memory: its encoded and decoded images come on top of it."""
WORTH_COMPILING = 1e15
"""Floating-point operations from which a job on CPUs is compiled: ResNet18 over 280,000 images. Compiling gains 5 to
17 % of the two hours that they take two cores, and is worth its while up to about sixty-four of them."""
GAINS = {
    r"swin_(t|s|b)(iny|mall|ase)?([_.]|$)": 6.5e-15,
    r"convnext_(t|s|b|l)(iny|mall|ase|arge)([_.]|$)": 1.7e-15,
    r"(tf_)?efficientnet_?v2_": 1.7e-15,
}
"""Seconds that compiling saves a GPU per floating-point operation, by names of models. Other families gain nothing
that was measured. Source: one H200, fp16, batches of 256, torch 2.11."""
COMPILE_S, WARM_S = 40.0, 16.0
"""Compiling takes a job on a GPU so long, and so long where Inductor's cache has all of it. Source: Swin-T there."""
MARGIN = 1.25
"""Compiling must win back this multiple of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompilePlan:
    """Rank 0's reading of `runtime.compile`."""

    compiled: bool
    may_fall_back: bool = False
    """The job goes on without, should the model not compile."""
    batch_size: int | None = None
    """To try it with. None: nothing is left to predict, or nothing is compiled."""


def choose_compile(setup: Setup) -> str:
    """Resolve `runtime.compile` to on or off, and try it where it is on. Collective: every rank calls this.

    The work that there is decides at a job's first start, because a compiled model's last bits are its own; on CPUs
    nothing that differs between worlds does.

    Raises:
        UsageError: `on` was asked for, or the folder was begun with it, and the model does not compile.
    """
    asked, world = setup.job.config.runtime.compile, setup.world
    if asked == "off":
        return "off"
    mine: dict[str, Any] | None = None
    with world.together("choose whether to compile"):
        if world.rank == 0:
            mine = asdict(_plan_compile(setup))
    plan = CompilePlan(**world.share("compile", mine))
    if not plan.compiled or plan.batch_size is None:
        return "on" if plan.compiled else "off"
    log.info("runtime.compile=%s: the model is compiled now, which takes half a minute the first time", asked)
    failures = _compile_on_all(Trial.of(setup, replace(setup.resolved, compile="on")), plan.batch_size)
    if not failures and world.rank == 0:
        note_compiled(_compiled_for(setup, plan.batch_size))
    if failures and not plan.may_fall_back:
        raise UsageError(
            f"runtime.compile must be off where the model cannot be compiled, got 'on' ({failures[0]}). Install"
            " what it needs, or set runtime.compile=off, in another folder if this one was begun with on."
        )
    if failures and world.rank == 0:
        log.warning("runtime.compile=auto is off, because the model cannot be compiled: %s", failures[0])
    return "off" if failures else "on"


def _plan_compile(setup: Setup) -> CompilePlan:
    """Decide by what was asked, by how the folder was begun, and by the work there is. Rank 0 only."""
    config, before = setup.job.config, setup.folder.before
    asked_on = config.runtime.compile == "on"
    if before and before.fingerprint.get("runtime.compile") != "on":
        # Where it is asked for nevertheless, the folder is refused when it is claimed.
        return CompilePlan(compiled=asked_on)
    if not before and not asked_on and not _may_be_compiled(config, setup.resolved, setup.world):
        return CompilePlan(compiled=False)
    length = len(open_samples(config, setup.files))
    start, stop = dataset_range(config, length)
    asked = SMALLEST if config.batch_size == "auto" else int(config.batch_size)
    batch_size = batch_size_of(config, asked, length)
    if before:
        changed = isinstance(setup.files, Listing) and len(setup.files.changed) > 0
        is_left = not before.complete or stop > before.stop or config.retry_failed or changed
        used = batch_size if setup.job.batch_size_given else before.batch_size
        return CompilePlan(compiled=True, batch_size=used if is_left else None)
    compiled = asked_on or _is_worth_compiling(setup, stop - start, batch_size)
    return CompilePlan(compiled=compiled, may_fall_back=not asked_on, batch_size=batch_size)


def _may_be_compiled(config: Config, resolved: Resolved, world: World) -> bool:
    """True where auto leaves the choice to the amount of work."""
    is_measured = world.device.type == "cpu" or (resolved.precision in ("fp16", "bf16") and _gain(config) > 0)
    # One shard of several must have the bits of the others.
    return is_measured and config.strategy == "ddp" and not config.shard and config.batch_size != "auto"


def _gain(config: Config) -> float:
    return next((gain for names, gain in GAINS.items() if re.match(names, config.model.name)), 0.0)


def _is_worth_compiling(setup: Setup, rows: int, batch_size: int) -> bool:
    work = rows * operations(setup.model.module, setup.resolved.transform)
    if setup.world.device.type == "cpu":
        return work >= WORTH_COMPILING
    gain_s = work / setup.world.size * _gain(setup.job.config)
    # To look into the cache takes long to import.
    if gain_s < MARGIN * WARM_S or gain_s >= MARGIN * COMPILE_S:
        return gain_s >= MARGIN * COMPILE_S
    return was_compiled(_compiled_for(setup, batch_size))


def _compiled_for(setup: Setup, batch_size: int) -> str:
    """Everything that a compiled model's code depends on."""
    resolved, device = setup.resolved, setup.world.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    model = (setup.model.identity, setup.model.num_classes, setup.job.config.runtime.channels_last)
    return repr((torch.__version__, name, model, resolved.speedups, resolved.precision, resolved.transform, batch_size))


def _compile_on_all(trial: "Trial", batch_size: int) -> list[str]:
    """Compile on every rank, and return one reason for each rank that failed. Collective: every rank calls this."""
    world, failures = trial.world, list[str]()
    # What the first rank of a host compiles, the others find in Inductor's cache.
    for is_turn in (world.local_rank == 0, world.local_rank > 0):
        failure = trial.failure(batch_size) if is_turn else None
        found = enumerate(world.exchange("compile", failure))
        failures += [f"rank {rank} of {world.size}: {text}" for rank, text in found if text]
    return failures


def find_batch_size(setup: Setup) -> int:
    """Resolve `batch_size`, the same on all ranks. Collective: every rank calls this."""
    asked, world = setup.job.config.batch_size, setup.world
    if asked != "auto":
        return int(asked)
    begun = setup.folder.before
    before = world.share("batch size", begun.batch_size if begun else None)
    if before is not None:
        return int(before)
    trial, rates = Trial.of(setup, setup.resolved), dict[int, float]()
    for batch_size in _doubling():
        rate, has_room = None, False
        with world.together(f"try batches of {batch_size}"):
            rate, has_room = trial.measure(batch_size)
        found = world.exchange("rate", [rate, has_room])
        if any(rate is None for rate, _ in found):
            break
        rates[batch_size] = sum(rate for rate, _ in found)
        log.info("batch_size=auto: %s images/s with %d", f"{rates[batch_size]:,.1f}", batch_size)
        if _flat(list(rates.values())) or not all(has_room for _, has_room in found):
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
    """True once the last two doublings gained next to nothing."""
    return len(rates) > 2 and max(rates[-2:]) < GAIN * max(rates[:-2])


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """Predicts noise, to see whether and how fast this rank does it."""

    predictor: Predictor
    transform: AnyTransform
    world: World

    @classmethod
    def of(cls, setup: Setup, resolved: Resolved) -> "Trial":
        """A trial with these choices. Collective: every rank calls this."""
        predictor = setup.predictors.get(resolved)
        return cls(predictor=predictor, transform=resolved.transform, world=setup.world)

    def failure(self, batch_size: int) -> str | None:
        """Why one batch cannot be predicted, None where it can."""
        try:
            self._predict_one(noise(self.transform, batch_size, self.world.device))
        except OutOfMemoryError:
            # The job itself splits such a batch, or ends (`runtime.on_oom`).
            return None
        except Exception as error:
            # Compiler errors are long; the cause comes last.
            reason = reason_of(error).partition(" Set TORCHDYNAMO_VERBOSE")[0]
            return reason if len(reason) < 400 else f"{reason[:150]} ... {reason[-250:]}"
        return None

    def measure(self, batch_size: int) -> tuple[float | None, bool]:
        """(images/s, None where batches of this size do not fit; whether batches of twice the size may)."""
        on_gpu = self.world.device.type == "cuda"
        free = torch.cuda.mem_get_info(self.world.device)[0] if on_gpu else available_bytes() // self.world.local_size
        kind = "peak_gpu_bytes" if on_gpu else "peak_host_bytes"
        reset_peaks()
        before = peaks()[kind]
        batch = noise(self.transform, batch_size, self.world.device)
        clock = Clock(warm_up=in_flight(self.world), began=time.perf_counter())
        try:
            # The model may have to be compiled for it.
            self._predict_one(batch)
            clock.started = time.perf_counter()
            predict_batches(_repeated(batch, clock), self.predictor, self.world, clock)
        except OutOfMemoryError:
            return None, False
        used = peaks()[kind] - before
        if clock.split_rows or used > SHARE_OF_MEMORY * free:
            return None, False
        rows, seconds = clock.steady
        return rows / seconds, 2 * used < SHARE_OF_MEMORY * free

    def _predict_one(self, batch: Batch) -> None:
        predict_batches([batch], self.predictor, self.world)


def predict_batches(
    batches: Iterable[Batch], predictor: Predictor, world: World, clock: Clock | None = None
) -> list[Rows]:
    """Predict batches as a job would."""
    clock = clock or Clock(warm_up=1, began=time.perf_counter())
    with closing(predict(batches, predictor, clock, world)) as predicted:
        return list(predicted)


def noise(transform: AnyTransform, batch_size: int, device: torch.device) -> Batch:
    """A batch of noise, or of a dataset's sample, moved about."""
    pinned, shape = device.type == "cuda", (batch_size, *transform.shape)
    generator = torch.Generator().manual_seed(0)
    if transform.dtype == torch.uint8:
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    elif isinstance(transform, TensorInput) and transform.example is not None:
        example = torch.from_numpy(transform.example).float()
        pixels = torch.stack([example.roll(row, -1) if example.dim() else example for row in range(batch_size)])
    else:
        pixels = torch.rand(shape, generator=generator)
    return Batch(
        index=np.arange(batch_size),
        label=np.zeros(batch_size, dtype=np.int32),
        pixels=pixels.pin_memory() if pinned else pixels,
        jpegs=None,
        errors={},
        seconds={},
        batch_size=batch_size,
        rows=batch_size,
    )


def _repeated(batch: Batch, clock: Clock) -> Iterator[Batch]:
    """The same batch, until the clock has seen enough of it."""
    while len(clock.batch_s) < 2 * clock.warm_up or time.perf_counter() - clock.started < MEASURED_S:
        yield batch
