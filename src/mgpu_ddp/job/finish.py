"""How a job ends: proved and reported, or marked as failed."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mgpu_ddp.errors import Exit, ProofError, UsageError, reason_of
from mgpu_ddp.job.claim import array_columns
from mgpu_ddp.job.collector import Ending
from mgpu_ddp.job.context import Claim, JobContext
from mgpu_ddp.output.manifest import Manifest, write_status
from mgpu_ddp.output.parts import write_error
from mgpu_ddp.output.replace import put_in_place
from mgpu_ddp.output.run_folder import remove_unlisted
from mgpu_ddp.output.verify import prove, write_errors
from mgpu_ddp.reporting import console, metrics
from mgpu_ddp.reporting.class_table import find_classes
from mgpu_ddp.reporting.page import JobResults, try_write_page
from mgpu_ddp.reporting.table_stats import count_rows
from mgpu_ddp.reporting.thumbnails import THUMBNAILS

log = logging.getLogger("mgpu_ddp")

ENDINGS: dict[Ending, tuple[str, Exit]] = {
    "complete": ("complete", Exit.COMPLETE),
    "preempted": ("preempted", Exit.PREEMPTED),
    "too many errors": ("failed", Exit.TOO_MANY_ERRORS),
}


@contextmanager
def holding(claim: Claim) -> Iterator[None]:
    """Let go of the claimed folder at the end of the block, and mark it as failed where that raised."""
    try:
        yield
    except Exception as error:
        if claim.manifest is not None:
            _mark_failed(claim.folder, reason_of(error))
        raise
    finally:
        if claim.held is not None:
            os.close(claim.held)


def _mark_failed(folder: Path, reason: str) -> None:
    try:
        # What is on disk counts, not what a failed commit left in memory.
        manifest = Manifest.read(folder)
        if manifest is not None and not manifest.complete:
            write_status(folder, "failed", manifest, reason)
    except (OSError, UsageError) as error:
        log.error("%s must be writable to say that the job failed, got: %s", folder / "status.json", error)


def finish_job(context: JobContext, ending: Ending) -> dict[str, Any]:
    """Prove, report and mark the folder. Collective: every rank calls this; all get the summary.

    Raises:
        ProofError: the folder does not hold exactly one row per sample.
    """
    world = context.world
    measured = metrics.measure(world, context.clock)
    ranks = [metrics.RankMetrics(**values) for values in world.exchange("metrics", asdict(measured))]
    summary: dict[str, Any] = {}
    with world.together("prove the table"):
        if context.claim.manifest is not None:
            try:
                summary = _conclude(context, context.claim.manifest, ending, ranks)
            except OSError as error:
                raise write_error(context.claim.folder, error) from error
    return dict(world.share("summary", summary))


def _conclude(
    context: JobContext, manifest: Manifest, ending: Ending, ranks: Sequence[metrics.RankMetrics]
) -> dict[str, Any]:
    job, claim, model, world = context.job, context.claim, context.model, context.world
    run_dir, how = job.run_dir, job.config.output.format
    # Ranks past the first one that stopped, or a late writer of a dead attempt, have left what nobody committed.
    remove_unlisted(run_dir, manifest)
    proof = prove(run_dir, manifest, how)
    status, code = ENDINGS[ending]
    reason = None
    if ending == "too many errors":
        reason = (
            f"max_errors must be at least the errors found, got {job.config.max_errors} and {proof.errors} errors."
            " Raise it to continue."
        )
    elif ending == "preempted":
        remedy = (
            "start the sweep again with its hydra.sweep.dir" if job.in_sweep else f"resume with output.dir={job.home}"
        )
        reason = f"stopped on request; {proof.missing} rows are left, {remedy}"
    elif (proof.rows, proof.missing, proof.duplicates) != (proof.total, 0, 0):
        raise ProofError(
            f"the table must hold each of {proof.total} samples once, got {proof.rows} rows, {proof.missing} missing,"
            f" {proof.duplicates} doubled."
        )
    write_errors(run_dir, manifest, how, claim.samples.path)
    manifest.complete = ending == "complete"
    manifest.write(run_dir)
    write_status(run_dir, status, manifest, reason)
    classes = find_classes(run_dir, manifest, model.class_names)
    classes.write(run_dir)
    stats = count_rows(run_dir, manifest, classes, claim.samples, num_picked=THUMBNAILS)
    summary = {
        "status": status,
        "exit_code": int(code),
        "reason": reason,
        "samples": proof.total,
        "rows": proof.rows,
        "ok": proof.rows - proof.errors,
        "errors": proof.errors,
        "missing": proof.missing,
        "duplicates": proof.duplicates,
        "predictions": [proof.rows, array_columns(job.config, model) or model.num_classes],
        "accuracy": stats.accuracy,
        "world_size": world.size,
        "batch_size": manifest.batch_size,
        "device": manifest.fingerprint["runtime.device"],
        "precision": manifest.fingerprint["runtime.precision"],
        "run_dir": str(job.home),
    }
    # Ranks past the first one that stopped predicted rows that nobody keeps.
    rows = sum(r.rows for r in ranks) if ending == "complete" else manifest.prefix - claim.prefix
    if sum(r.rows for r in ranks) or not (run_dir / "metrics.json").exists():
        accuracy = {"accuracy": stats.accuracy, "accuracy_per_class": stats.per_class(classes)}
        summary |= metrics.write_metrics(
            run_dir,
            ranks,
            rows=rows,
            deterministic=job.config.runtime.deterministic,
            accuracy=accuracy,
        )
    else:
        ranks = []
    try_write_page(
        JobResults(
            run_dir=run_dir,
            home=job.home,
            manifest=manifest,
            classes=classes,
            stats=stats,
            samples=claim.samples,
        )
    )
    if job.replaces is not None and ending == "complete":
        put_in_place(job.replaces)
    console.print_table(summary, ranks)
    return summary
