"""How a job ends: proved and reported, or marked as failed."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mgpu_ddp import report
from mgpu_ddp.claiming import remove_unlisted
from mgpu_ddp.collect import Collector, Ending
from mgpu_ddp.datasets import Samples
from mgpu_ddp.errors import Exit, ProofError
from mgpu_ddp.job import Claim, Job
from mgpu_ddp.manifest import Manifest, write_status
from mgpu_ddp.models import Model
from mgpu_ddp.predict import Clock
from mgpu_ddp.proof import prove, write_errors
from mgpu_ddp.world import World

ENDINGS: dict[Ending, tuple[str, Exit]] = {
    "complete": ("complete", Exit.COMPLETE),
    "preempted": ("preempted", Exit.PREEMPTED),
    "too many errors": ("failed", Exit.TOO_MANY_ERRORS),
}


def finish_job(
    job: Job, claim: Claim, samples: Samples, model: Model, world: World, clock: Clock, collector: Collector
) -> dict[str, Any]:
    """Prove, report and mark the folder. Collective: every rank calls this; all get the summary.

    Raises:
        ProofError: the folder does not hold exactly one row per sample.
    """
    measured = report.measure(world, clock, collector)
    ranks = [report.RankMetrics(**values) for values in world.exchange("metrics", asdict(measured))]
    summary: dict[str, Any] = {}
    with world.together("prove the table"):
        if world.rank == 0:
            assert claim.manifest is not None
            summary = _conclude(job, claim.manifest, samples, model, world, collector.ending, ranks)
    if claim.held is not None:
        os.close(claim.held)
    return dict(world.share("summary", summary))


def _conclude(
    job: Job,
    manifest: Manifest,
    samples: Samples,
    model: Model,
    world: World,
    ending: Ending,
    ranks: Sequence[report.RankMetrics],
) -> dict[str, Any]:
    run_dir, how = job.run_dir, job.config.output.format
    if ending != "complete":
        # Ranks past the first one that stopped have written what was then not committed.
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
        reason = f"stopped on request; {proof.missing} rows are left, start again to resume"
    elif (proof.rows, proof.missing, proof.duplicates) != (proof.total, 0, 0):
        raise ProofError(
            f"the table must hold each of {proof.total} samples once, got {proof.rows} rows, {proof.missing} missing,"
            f" {proof.duplicates} doubled."
        )
    write_errors(run_dir, manifest, how, samples)
    manifest.complete = ending == "complete"
    manifest.write(run_dir)
    write_status(run_dir, status, manifest, reason)
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
        "predictions": [proof.rows, model.num_classes],
        "world_size": world.size,
        "batch_size": manifest.batch_size,
        "device": manifest.fingerprint["runtime.device"],
        "precision": manifest.fingerprint["runtime.precision"],
        "run_dir": str(run_dir),
    }
    if sum(r.rows for r in ranks) or not (run_dir / "metrics.json").exists():
        summary |= report.write_metrics(run_dir, ranks)
    else:
        ranks = []
    report.print_table(summary, ranks)
    return summary


def fail_job(job: Job, reason: str) -> dict[str, Any]:
    """Mark a claimed folder as failed, and say so on stdout. Rank 0 only."""
    manifest = Manifest.read(job.run_dir)
    if manifest is not None and not manifest.complete:
        write_status(job.run_dir, "failed", manifest, reason)
    summary = {
        "status": "failed",
        "exit_code": int(Exit.FAILED),
        "reason": reason,
        "run_dir": str(job.run_dir),
    }
    report.print_summary(summary)
    return summary
