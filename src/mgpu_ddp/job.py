"""One job: what it is, its place in the run folder, and its plan."""

import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from mgpu_ddp import report
from mgpu_ddp.claiming import claim_folder, hold_folder, to_continue
from mgpu_ddp.collect import Collector
from mgpu_ddp.config import Config, FolderConfig, parse_shard
from mgpu_ddp.datasets import Samples, open_samples
from mgpu_ddp.errors import Exit, SampleError
from mgpu_ddp.listing import FILE_NAME, Listing
from mgpu_ddp.loading import num_workers
from mgpu_ddp.manifest import Manifest, versions, write_bytes, write_status
from mgpu_ddp.models import Model, precision_of, weights_digest
from mgpu_ddp.predict import in_flight
from mgpu_ddp.preprocess import Transform
from mgpu_ddp.report import Progress
from mgpu_ddp.rows import Rows
from mgpu_ddp.sharding import Plan
from mgpu_ddp.signals import StopWish
from mgpu_ddp.world import Channel, World
from mgpu_ddp.writing import open_writer

log = logging.getLogger("mgpu_ddp")

WINDOW_BYTES = 64 << 20
"""Of the rows that travel to rank 0 in one window, from all ranks together."""
STRETCH_BYTES = 8 << 20
"""Of the rows that one rank writes itself in one window."""

EMBEDDING_DIM = 2048
"""Assumed where the width of an embedding only sizes buffers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A validated configuration with the place and the name it runs under."""

    name: str
    """Unique in this process; payloads carry it."""
    config: Config
    run_dir: Path
    batch_size_given: bool = True
    hydra_files: dict[str, Any] | None = None
    """What goes into RUN/.hydra, by file name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What every rank knows of the run folder once it is this job's."""

    start: int
    """The job's range of dataset indices is [start, stop)."""
    stop: int
    prefix: int
    """The first index that is not committed yet."""
    errors: int
    """Error rows committed before."""
    batch_size: int
    token: str
    """Of this attempt; part names carry it."""
    manifest: Manifest | None
    """On rank 0."""
    held: int | None
    """On rank 0: the descriptor that keeps other jobs out."""


def dataset_range(config: Config, length: int) -> tuple[int, int]:
    """The contiguous range of indices that `limit` and `shard` leave."""
    total = length if config.limit is None else min(length, config.limit)
    i, n = parse_shard(config.shard)
    return total * i // n, total * (i + 1) // n


def fingerprint(
    config: Config, model: Model, transform: Transform, world: World, files: Listing | None
) -> dict[str, Any]:
    """The keys that decide what the rows say, resolved. Rank 0 only."""
    runtime = config.runtime
    return {
        **{f"data.{key}": value for key, value in asdict(config.data).items()},
        "listing": files.digest if files is not None else None,
        **{f"transform.{k}": list(v) if isinstance(v, tuple) else v for k, v in asdict(transform).items()},
        "model.name": config.model.name,
        "model.num_classes": model.num_classes,
        "model.weights": weights_digest(model.module),
        "strategy": config.strategy,
        "runtime.device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "runtime.precision": precision_of(runtime, world.device),
        "runtime.channels_last": runtime.channels_last,
        "runtime.fold": runtime.fold,
        "runtime.compile": runtime.compile == "on",
        "output.format": config.output.format,
        "output.fields": sorted(config.output.fields),
        "output.topk": config.output.topk,
    }


def claim_job(job: Job, model: Model, transform: Transform, files: Listing | None, world: World) -> Claim:
    """Make the run folder this job's and tell all ranks where to begin. Collective: every rank calls this.

    Raises:
        UsageError: the folder holds another job or cannot be written to.
    """
    config, run_dir = job.config, job.run_dir
    manifest: Manifest | None = None
    held: int | None = None
    with world.together("claim the run folder"):
        if world.rank == 0:
            start, stop = dataset_range(config, len(open_samples(config, files)))
            wanted = Manifest(
                fingerprint=fingerprint(config, model, transform, world, files),
                start=start,
                stop=stop,
                batch_size=config.batch_size,
                world_sizes=[world.size],
                versions=versions(),
            )
            overwrite = config.overwrite and world.once_per_launch(f"overwrite/{run_dir}")
            # A restarted attempt finds what the dead one of the same launch has left.
            resume = config.resume or world.attempt > 0
            if not overwrite:
                to_continue(run_dir, wanted, resume=resume)
            # What is refused must not even be touched by a lock; what is not may change until the lock is there.
            held = hold_folder(run_dir)
            manifest = claim_folder(
                run_dir,
                wanted,
                resume=resume,
                overwrite=overwrite,
                batch_size_given=job.batch_size_given,
                array_columns=model.num_classes if config.output.format == "npy" else None,
            )
            _furnish(job, files, manifest)
    return _share_claim(manifest, held, world)


def _share_claim(manifest: Manifest | None, held: int | None, world: World) -> Claim:
    mine: dict[str, Any] | None = None
    if manifest is not None:
        mine = {name: getattr(manifest, name) for name in ("start", "stop", "prefix", "errors", "batch_size")}
        mine["token"] = secrets.token_hex(3)
    return Claim(**world.share("claim", mine), manifest=manifest, held=held)


def _furnish(job: Job, files: Listing | None, manifest: Manifest) -> None:
    """Put what belongs into a claimed folder: the listing, the composed configuration, the status."""
    if files is not None and not manifest.parts:
        write_bytes(job.run_dir / FILE_NAME, files.buffer)
    if job.hydra_files:
        (job.run_dir / ".hydra").mkdir(exist_ok=True)
        for name, node in job.hydra_files.items():
            OmegaConf.save(node, job.run_dir / ".hydra" / name)
    if not manifest.complete:
        write_status(job.run_dir, "running", manifest)


def open_claimed(job: Job, files: Listing | None, world: World) -> Samples:
    """The samples as every process of the job sees them. Collective: every rank calls this."""
    with world.together("open the samples"):
        if isinstance(job.config.data, FolderConfig) and job.run_dir.is_dir():
            files = Listing.open(job.run_dir / FILE_NAME)
        return open_samples(job.config, files)


def row_bytes(config: Config, num_classes: int) -> int:
    """About how many bytes one row takes on its way."""
    fields = config.output.fields
    wide = ("logits" in fields or config.output.format == "npy") + ("probs" in fields)
    numbers = num_classes * wide + EMBEDDING_DIM * ("embedding" in fields) + 2 * config.output.topk
    return 64 + 4 * numbers


def plan_job(config: Config, claim: Claim, num_classes: int, world: World) -> Plan:
    """The windows that are left to do. Collective: every rank calls this."""
    contiguous = config.collect == "shards"
    ahead = num_workers(config.loader, world) * config.loader.prefetch + in_flight(world) + 1
    if config.output.commit_every == "auto":
        step = world.size * claim.batch_size
        smallest = max(world.exchange("batches read ahead", ahead)) * step
        budget = STRETCH_BYTES * world.size if contiguous else WINDOW_BYTES
        largest = budget // row_bytes(config, num_classes)
    else:
        smallest = largest = int(config.output.commit_every)
    return Plan(
        start=claim.prefix,
        stop=claim.stop,
        size=world.size,
        batch_size=claim.batch_size,
        contiguous=contiguous,
        smallest_rows=smallest,
        largest_rows=largest,
    )


@contextmanager
def collecting(
    job: Job,
    claim: Claim,
    plan: Plan,
    samples: Samples,
    model: Model,
    transform: Transform,
    world: World,
    stop: StopWish,
) -> Iterator[Collector]:
    """A collector that is ready to take this rank's rows. Collective: every rank enters and leaves."""
    config, total = job.config, claim.stop - claim.start
    world.pulse.timeout_s = config.dist.timeout_s
    channel = Channel(world, job.name, config.dist.timeout_s)
    writer = open_writer(job.run_dir, config.output.format, samples, model.class_names, claim.token, claim.start)
    collector = Collector(
        job=job.name,
        world=world,
        plan=plan,
        channel=channel,
        writer=writer,
        manifest=claim.manifest,
        run_dir=job.run_dir,
        stop=stop,
        errors_before=claim.errors,
        max_errors=error_limit(config, total),
    )
    with report.log_into(job.run_dir, world), Progress(world, total, claim.prefix - claim.start), collector:
        height, width = transform.out_size
        model_bytes = sum(p.numel() * p.element_size() for p in model.module.parameters())
        report.log_plan(world, config.runtime, model_bytes, claim.batch_size * 3 * height * width * 4)
        left = claim.stop - claim.prefix
        log.info("%s; batch_size %d; %s of %s rows to do", model.origin, claim.batch_size, f"{left:,}", f"{total:,}")
        yield collector
    channel.close()


def error_limit(config: Config, total: int) -> float:
    """`max_errors` as a count."""
    limit = config.max_errors
    if limit is None:
        return float("inf")
    return limit * total if isinstance(limit, float) and limit < 1 else limit


def refuse_bad_samples(rows: Rows, job: Job, samples: Samples) -> None:
    """End the job for a bad sample, as `on_error=raise` asks.

    Raises:
        SampleError: names the file and the reason.
    """
    for index, reason in rows.errors.items() if job.config.on_error == "raise" else ():
        name = samples.path(index) or f"sample {index}"
        raise SampleError(f"{name} (index {index}) must be readable, got {reason}. Mend it or set on_error=record.")


def dry_run(job: Job, model: Model, files: Listing | None, world: World) -> dict[str, Any]:
    """Print the plan of a fresh start and touch nothing. Collective: every rank calls this."""
    start, stop = world.share(
        "samples",
        dataset_range(job.config, len(open_samples(job.config, files))) if world.rank == 0 else None,
    )
    claim = Claim(
        start=start,
        stop=stop,
        prefix=start,
        errors=0,
        batch_size=job.config.batch_size,
        token="",
        manifest=None,
        held=None,
    )
    plan = plan_job(job.config, claim, model.num_classes, world)
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
