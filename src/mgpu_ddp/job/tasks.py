"""The work that is left of a job: its tasks, their windows, and the collector that takes their rows."""

import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mgpu_ddp.config.schema import Config
from mgpu_ddp.data.samples import ChosenSamples, Samples
from mgpu_ddp.distributed.channel import Channel
from mgpu_ddp.distributed.sharding import Plan, ShardSampler
from mgpu_ddp.errors import SampleError, plural
from mgpu_ddp.inference.pipeline import held_slots, predict
from mgpu_ddp.inference.predictor import NONFINITE
from mgpu_ddp.inference.trace import Profile
from mgpu_ddp.job.agreement import Limits
from mgpu_ddp.job.collector import Collector, Committer, Sink
from mgpu_ddp.job.context import JobContext
from mgpu_ddp.job.plan import Planner
from mgpu_ddp.loader.loader import load_batches
from mgpu_ddp.output.columns import carried_names
from mgpu_ddp.output.parts import open_writer
from mgpu_ddp.output.rows import Rows
from mgpu_ddp.output.verify import error_rows
from mgpu_ddp.reporting import console
from mgpu_ddp.reporting.console import Progress

log = logging.getLogger("mgpu_ddp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One pass over samples, window by window."""

    name: str
    """One of its rows, in the log."""
    plan: Plan
    samples: Samples
    chosen: npt.NDArray[np.int64] | None
    """Dataset indices of the samples, where they are some and not all."""
    total: int
    errors_before: int
    """Errors that count against `max_errors` besides those of this task."""


def tasks(context: JobContext) -> Iterator[Task]:
    """The samples without a row, then those to predict again. Collective: every rank walks it, or leaves it."""
    config, claim, world = context.config, context.claim, context.world
    carried_bytes = claim.samples.carried_bytes
    planner = Planner(
        config=config, resolved=context.resolved, types=context.types, world=world, carried_bytes=carried_bytes
    )
    yield Task(
        name="row",
        plan=planner.plan(claim.prefix, claim.stop),
        samples=claim.samples,
        chosen=None,
        total=claim.stop - claim.start,
        errors_before=claim.errors,
    )
    if _comes_again(context):
        chosen = _failed_rows(context) if config.retry_failed else claim.changed
        yield Task(
            name="failed row" if config.retry_failed else "changed image",
            plan=planner.plan_few(len(chosen)),
            samples=ChosenSamples(claim.samples, chosen),
            chosen=chosen,
            total=len(chosen),
            errors_before=_errors_besides(context, chosen),
        )


def _comes_again(context: JobContext) -> bool:
    """True if samples that have a row are predicted again, after those without one."""
    return context.config.retry_failed or len(context.claim.changed) > 0


def _failed_rows(context: JobContext) -> npt.NDArray[np.int64]:
    """Dataset indices of the error rows. Collective: every rank calls this."""
    folder, failed = context.folder, list[int]()
    with context.world.together("find the failed rows"):
        if context.world.rank == 0:
            rows = error_rows(folder.path, folder.claimed, context.claim.samples.path)
            failed = [index for index, _, _ in rows]
    return np.array(context.world.share("failed rows", failed), dtype=np.int64)


def _errors_besides(context: JobContext, chosen: npt.NDArray[np.int64]) -> int:
    """Error rows that are not tried again. Collective: every rank calls this."""
    mine = context.folder.claimed.errors - len(chosen) if context.world.rank == 0 else 0
    return int(context.world.share("other errors", mine))


@contextmanager
def collecting(context: JobContext, task: Task) -> Iterator[Collector]:
    """A collector that is ready to take this rank's rows. Collective: every rank enters and leaves."""
    config, claim, world, plan = context.config, context.claim, context.world, task.plan
    channel = Channel(world, f"{context.job.name}/{task.name}", config.dist.timeout_s)
    max_errors = error_limit(config, claim.stop - claim.start)
    limits = Limits(stop=plan.stop, errors_before=task.errors_before, max_errors=max_errors)
    collector = Collector(context, plan, Committer(context, plan, channel, _open_sink(context, task), limits))
    with (
        console.log_into(context.folder.path, world),
        Progress(world, task.total, task.total - plan.rows_left),
        collector,
    ):
        # Where only the second task has rows to do, it speaks for both.
        if task.plan.rows_left or task.chosen is not None or not _comes_again(context):
            _log_task(context, task)
        yield collector
    channel.close()


def _open_sink(context: JobContext, task: Task) -> Sink:
    config, claim, class_names = context.config, context.claim, context.model.class_names
    # A task may choose among the samples; parts name them as the dataset does.
    samples, how = claim.samples, config.output.format
    columns = carried_names(getattr(config.data, "carry", []), context.types)

    def carried_of(index: npt.NDArray[np.int64]) -> dict[str, Any]:
        return {columns[name]: values for name, values in samples.carried(index).items()}

    writer = open_writer(
        context.folder.path, how, samples.names, class_names, claim.token, claim.start, carried_of=carried_of
    )
    table = context.folder.open_table(writer, task.chosen) if context.world.rank == 0 else None
    return Sink(writer=writer, table=table)


def _log_task(context: JobContext, task: Task) -> None:
    resolved, model = context.resolved, context.model
    sample_bytes = math.prod(resolved.transform.shape) * 4
    model_bytes = sum(p.numel() * p.element_size() for p in model.module.parameters())
    console.log_plan(context.world, resolved, model_bytes, resolved.batch_size * sample_bytes)
    log.info(
        "%s; batch_size %d; %s of %s to do",
        model.origin,
        resolved.batch_size,
        f"{task.plan.rows_left:,}",
        plural(task.total, task.name),
    )


def error_limit(config: Config, total: int) -> float:
    """`max_errors` as a count."""
    limit = config.max_errors
    if limit is None:
        return float("inf")
    return limit * total if isinstance(limit, float) and limit < 1 else limit


def too_many_errors(context: JobContext) -> bool:
    """True if the folder holds more errors than `max_errors` before anything is predicted."""
    config, claim = context.config, context.claim
    return not config.retry_failed and claim.errors > error_limit(config, claim.stop - claim.start)


def refuse_bad_samples(rows: Rows, config: Config, samples: Samples) -> None:
    """End the job for a bad sample, as `on_error=raise` and `output.nonfinite=raise` ask.

    Raises:
        SampleError: names the file and the reason.
    """
    for index, reason in rows.errors.items():
        key = "output.nonfinite" if reason == NONFINITE else "on_error"
        if (config.output.nonfinite if reason == NONFINITE else config.on_error) == "raise":
            name = samples.path(index) or f"sample {index}"
            text = f"{name} (index {index}) cannot be predicted: {reason}. Fix it or set {key}=record."
            raise SampleError(text, (f"{key}=record",))


def predict_task(context: JobContext, task: Task, collector: Collector) -> None:
    """Predict this rank's share of a task, with nothing collective in the loop."""
    world, resolved, clock = context.world, context.resolved, context.clock
    sampler = ShardSampler(task.plan, world.rank)
    held = held_slots(resolved, world)
    loaded = load_batches(task.samples, sampler, context.config.loader, resolved, world, held=held)
    with loaded as batches, closing(predict(batches, context.predictor, clock, world, context.types)) as predicted:
        for rows in predicted:
            refuse_bad_samples(rows, context.config, task.samples)
            collector.add(rows)
            if collector.over:
                return


def profiled(context: JobContext) -> AbstractContextManager[None]:
    """Trace some of the batches in the block, where that was asked for."""
    if not context.config.runtime.profile:
        return nullcontext()
    claim, world = context.claim, context.world
    num_batches = (claim.stop - claim.prefix) // (world.size * context.resolved.batch_size)
    profile = Profile(world, context.folder.path, num_batches)
    context.clock.on_batch = profile.step
    return profile.tracing()
