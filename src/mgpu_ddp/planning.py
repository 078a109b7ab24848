"""What is left to do of a job: its tasks, their windows, and the collector that takes their rows."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mgpu_ddp import report
from mgpu_ddp.collect import Collector
from mgpu_ddp.config import Config
from mgpu_ddp.datasets import ChosenSamples, Samples, open_samples
from mgpu_ddp.errors import Exit, SampleError
from mgpu_ddp.job import Claim, Job, dataset_range
from mgpu_ddp.listing import Listing
from mgpu_ddp.loading import num_workers
from mgpu_ddp.models import Model
from mgpu_ddp.predict import NONFINITE, Clock, held_batches
from mgpu_ddp.preprocess import Transform
from mgpu_ddp.proof import error_rows
from mgpu_ddp.report import Progress
from mgpu_ddp.rows import Rows
from mgpu_ddp.sharding import Plan
from mgpu_ddp.signals import StopWish
from mgpu_ddp.world import Channel, World
from mgpu_ddp.writing import MendedTable, Table, open_writer

log = logging.getLogger("mgpu_ddp")

WINDOW_BYTES = 64 << 20
"""Of the rows that travel to rank 0 in one window, from all ranks together."""
MUCH = 8
"""Times `WINDOW_BYTES` that rank 0 should not have to hold. What all ranks read ahead bounds a window from below."""
STRETCH_BYTES = 8 << 20
"""Of the rows that one rank writes itself in one window."""

EMBEDDING_DIM = 2048
"""Assumed where the width of an embedding only sizes buffers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One pass over samples, window by window."""

    name: str
    """What its rows are, for the log."""
    plan: Plan
    samples: Samples
    chosen: npt.NDArray[np.int64] | None
    """Dataset indices of the samples, where they are some and not all."""
    total: int
    errors_before: int
    """Errors that count against `max_errors` besides those of this task."""


def tasks(job: Job, claim: Claim, model: Model, world: World) -> Iterator[Task]:
    """The samples without a row, then those to retry. Collective: every rank walks it to its end or leaves it."""
    config, samples = job.config, claim.samples
    sizes = {"batch_size": claim.batch_size, "num_classes": model.num_classes}
    contiguous, block = config.collect == "shards", config.loader.block
    plan = _plan(config, claim.prefix, claim.stop, contiguous=contiguous, block=block, **sizes, world=world)
    yield Task(
        name="rows",
        plan=plan,
        samples=samples,
        chosen=None,
        total=claim.stop - claim.start,
        errors_before=claim.errors,
    )
    if not config.retry_failed:
        return
    failed: list[int] = []
    with world.together("find the failed rows"):
        if claim.manifest is not None:
            failed = [
                index for index, _, _ in error_rows(job.run_dir, claim.manifest, config.output.format, samples.path)
            ]
    chosen = np.array(world.share("failed rows", failed), dtype=np.int64)
    # They are few, and lie apart.
    plan = _plan(config, 0, len(chosen), contiguous=False, block=1, **sizes, world=world)
    yield Task(
        name="failed rows",
        plan=plan,
        samples=ChosenSamples(samples, chosen),
        chosen=chosen,
        total=len(chosen),
        errors_before=0,
    )


def row_bytes(config: Config, num_classes: int) -> int:
    """About how many bytes one row takes on its way."""
    fields = config.output.fields
    logits = "logits" in fields or (config.output.format == "npy" and "embedding" not in fields)
    numbers = num_classes * (logits + ("probs" in fields)) + EMBEDDING_DIM * ("embedding" in fields)
    return 64 + (2 if config.output.dtype == "fp16" else 4) * numbers + 8 * config.output.topk


def _plan(
    config: Config,
    start: int,
    stop: int,
    *,
    contiguous: bool,
    block: int,
    batch_size: int,
    num_classes: int,
    world: World,
) -> Plan:
    """Windows over [start, stop). Collective: every rank calls this."""
    ahead = num_workers(config, world) * config.loader.prefetch + 1
    ahead += held_batches(config, batch_size, world)
    if config.output.commit_every == "auto":
        step = world.size * batch_size
        smallest = max(world.exchange("batches read ahead", ahead)) * step
        budget = STRETCH_BYTES * world.size if contiguous else WINDOW_BYTES
        largest = budget // row_bytes(config, num_classes)
        if not contiguous and smallest > MUCH * largest:
            log.warning(
                "the smallest window of %d ranks is %s rows, which all travel to rank 0: set output.collect=shards",
                world.size,
                f"{smallest:,}",
            )
    else:
        smallest = largest = int(config.output.commit_every)
    return Plan(
        start=start,
        stop=stop,
        size=world.size,
        batch_size=batch_size,
        contiguous=contiguous,
        smallest_rows=smallest,
        largest_rows=largest,
        block=block,
    )


@contextmanager
def collecting(
    job: Job, task: Task, claim: Claim, model: Model, transform: Transform, world: World, stop: StopWish, clock: Clock
) -> Iterator[Collector]:
    """A collector that is ready to take this rank's rows. Collective: every rank enters and leaves."""
    config, plan = job.config, task.plan
    channel = Channel(world, f"{job.name}/{task.name}", config.dist.timeout_s)
    # A task may choose among the samples; parts name them as the dataset does.
    names_of = claim.samples.names
    writer = open_writer(job.run_dir, config.output.format, names_of, model.class_names, claim.token, claim.start)
    table: Table | None = None
    if claim.manifest is not None:
        table = Table(job.run_dir, claim.manifest, writer)
        if task.chosen is not None:
            table = MendedTable(job.run_dir, claim.manifest, writer, task.chosen)
    collector = Collector(
        job=job.name,
        world=world,
        plan=plan,
        channel=channel,
        writer=writer,
        table=table,
        clock=clock,
        stop=stop,
        errors_before=task.errors_before,
        max_errors=error_limit(config, claim.stop - claim.start),
    )
    with report.log_into(job.run_dir, world), Progress(world, task.total, task.total - plan.rows_left), collector:
        height, width = transform.out_size
        model_bytes = sum(p.numel() * p.element_size() for p in model.module.parameters())
        report.log_plan(world, config, model_bytes, claim.batch_size * 3 * height * width * 4)
        log.info(
            "%s; batch_size %d; %s of %s %s to do",
            model.origin,
            claim.batch_size,
            f"{plan.rows_left:,}",
            f"{task.total:,}",
            task.name,
        )
        yield collector
    channel.close()


def error_limit(config: Config, total: int) -> float:
    """`max_errors` as a count."""
    limit = config.max_errors
    if limit is None:
        return float("inf")
    return limit * total if isinstance(limit, float) and limit < 1 else limit


def too_many_errors(job: Job, claim: Claim) -> bool:
    """Whether the folder holds more errors than `max_errors` before anything is predicted."""
    return not job.config.retry_failed and claim.errors > error_limit(job.config, claim.stop - claim.start)


def refuse_bad_samples(rows: Rows, job: Job, samples: Samples) -> None:
    """End the job for a bad sample, as `on_error=raise` and `output.nonfinite=raise` ask.

    Raises:
        SampleError: names the file and the reason.
    """
    config = job.config
    for index, reason in rows.errors.items():
        key = "output.nonfinite" if reason == NONFINITE else "on_error"
        if (config.output.nonfinite if reason == NONFINITE else config.on_error) == "raise":
            name = samples.path(index) or f"sample {index}"
            raise SampleError(f"{name} (index {index}) must be predicted, got {reason}. Mend it or set {key}=record.")


def dry_run(job: Job, model: Model, files: Listing | None, world: World) -> dict[str, Any]:
    """Print the plan of a fresh start and touch nothing. Collective: every rank calls this."""
    start, stop = world.share(
        "samples",
        dataset_range(job.config, len(open_samples(job.config, files))) if world.rank == 0 else None,
    )
    contiguous = job.config.collect == "shards"
    # auto is found when the job starts, and needs the device for it.
    batch_size = 32 if job.config.batch_size == "auto" else int(job.config.batch_size)
    plan = _plan(
        job.config,
        start,
        stop,
        contiguous=contiguous,
        block=job.config.loader.block,
        batch_size=batch_size,
        num_classes=model.num_classes,
        world=world,
    )
    summary = {
        "status": "planned",
        "exit_code": int(Exit.COMPLETE),
        "samples": stop - start,
        "run_dir": str(job.run_dir),
    }
    if world.rank == 0:
        print(describe_plan(job, plan, model.num_classes))
        report.print_summary(summary)
    return summary


def describe_plan(job: Job, plan: Plan, num_classes: int) -> str:
    rows = plan.stop - plan.start
    windows = "about " if plan.smallest != plan.largest else ""
    num_bytes = rows * row_bytes(job.config, num_classes)
    return "\n".join(
        [
            f"run folder     {job.run_dir}",
            f"samples        {rows:,} ({plan.start:,} to {plan.stop:,})",
            f"rows per rank  {', '.join(f'{plan.count(rank):,}' for rank in range(plan.size))}",
            f"windows        {windows}{-(-rows // plan.smallest):,} of at least {plan.smallest:,} rows",
            f"output         {job.config.output.format}, about {num_bytes / 2**20:,.1f} MiB before compression",
        ]
    )
