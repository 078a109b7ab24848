"""What is left to do of a job: its tasks, their windows, and the collector that takes their rows."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mgpu_ddp.config.schema import Config
from mgpu_ddp.data.datasets import ChosenSamples, Samples
from mgpu_ddp.distributed.channel import Channel
from mgpu_ddp.distributed.sharding import Plan
from mgpu_ddp.distributed.signals import StopWish
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import SampleError
from mgpu_ddp.inference.clock import Clock
from mgpu_ddp.inference.predictor import NONFINITE
from mgpu_ddp.job.claim import Claim
from mgpu_ddp.job.collector import Collector
from mgpu_ddp.job.job import Job
from mgpu_ddp.job.plan import make_plan
from mgpu_ddp.models.build import Model
from mgpu_ddp.output.parts import MendedTable, Table, open_writer
from mgpu_ddp.output.rows import Rows
from mgpu_ddp.output.verify import error_rows
from mgpu_ddp.preprocess.transform import Transform
from mgpu_ddp.reporting import console
from mgpu_ddp.reporting.console import Progress

log = logging.getLogger("mgpu_ddp")


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
    plan = make_plan(config, claim.prefix, claim.stop, contiguous=contiguous, block=block, **sizes, world=world)
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
    plan = make_plan(config, 0, len(chosen), contiguous=False, block=1, **sizes, world=world)
    yield Task(
        name="failed rows",
        plan=plan,
        samples=ChosenSamples(samples, chosen),
        chosen=chosen,
        total=len(chosen),
        errors_before=0,
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
    with console.log_into(job.run_dir, world), Progress(world, task.total, task.total - plan.rows_left), collector:
        height, width = transform.out_size
        model_bytes = sum(p.numel() * p.element_size() for p in model.module.parameters())
        console.log_plan(world, config, model_bytes, claim.batch_size * 3 * height * width * 4)
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
