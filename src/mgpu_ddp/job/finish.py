"""The end of a job: the folder is proved and marked, its results are counted, reported and published."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mgpu_ddp.errors import Exit, plural
from mgpu_ddp.job.agreement import Ending
from mgpu_ddp.job.context import JobContext
from mgpu_ddp.output.parts import write_error
from mgpu_ddp.output.run_folder import Status
from mgpu_ddp.output.verify import Proof
from mgpu_ddp.reporting import console, metrics
from mgpu_ddp.reporting.class_table import find_classes
from mgpu_ddp.reporting.page import JobResults, try_write_page
from mgpu_ddp.reporting.table_stats import count_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The status that a job leaves, and why."""

    status: Status
    exit_code: Exit
    reason: str | None = None
    next_command: str | None = None
    """Goes on with what is left of it."""


def finish_job(context: JobContext, ending: Ending) -> dict[str, Any]:
    """Prove, mark and report the job. Collective: every rank calls this; all get the summary.

    Raises:
        ProofError: the folder does not hold exactly one row per sample.
    """
    world = context.world
    measured = metrics.measure(world, context.clock)
    ranks = [metrics.RankMetrics(**values) for values in world.exchange("metrics", asdict(measured))]
    summary: dict[str, Any] = {}
    with world.together("prove the table"):
        if world.rank == 0:
            try:
                summary = _conclude(context, ending, ranks)
            except OSError as error:
                raise write_error(context.folder.path, error) from error
    return dict(world.share("summary", summary))


def _conclude(context: JobContext, ending: Ending, ranks: Sequence[metrics.RankMetrics]) -> dict[str, Any]:
    folder = context.folder
    outcome = _outcome(context, ending)
    proof = folder.finish(outcome.status, context.claim.samples.path, outcome.reason, outcome.next_command)
    results = _count(context)
    summary = _summarise(context, outcome, proof, results)
    if sum(rank.rows for rank in ranks) or not (folder.path / "metrics.json").exists():
        summary |= _write_metrics(context, ranks, results)
    else:
        ranks = []
    try_write_page(results)
    folder.publish()
    console.print_table(summary, ranks)
    return summary


def _outcome(context: JobContext, ending: Ending) -> Outcome:
    manifest, job = context.folder.claimed, context.job
    if ending == "too many errors":
        reason = (
            f"max_errors must be at least the errors found, got {context.config.max_errors} and"
            f" {plural(manifest.errors, 'error')}. Raise it to continue."
        )
        again = job.next_command(("max_errors=null",))
        return Outcome(status="failed", exit_code=Exit.TOO_MANY_ERRORS, reason=reason, next_command=again)
    if ending == "preempted":
        reason = f"stopped on request; {plural(manifest.stop - manifest.prefix, 'row')} left"
        again = job.next_command()
        return Outcome(status="preempted", exit_code=Exit.PREEMPTED, reason=reason, next_command=again)
    # A sweep does not run its complete jobs again.
    retries = manifest.errors > 0 and not job.in_sweep
    again = job.next_command(("retry_failed=true",)) if retries else None
    return Outcome(status="complete", exit_code=Exit.COMPLETE, next_command=again)


def _count(context: JobContext) -> JobResults:
    """Count the rows of the table by class, which is named in `classes.json`."""
    folder, samples = context.folder, context.claim.samples
    classes = find_classes(folder.path, folder.claimed, context.model.class_names)
    classes.write(folder.path)
    return JobResults(
        run_dir=folder.path,
        home=folder.home,
        manifest=folder.claimed,
        classes=classes,
        stats=count_rows(folder.path, folder.claimed, classes, samples),
        samples=samples,
    )


def _summarise(context: JobContext, outcome: Outcome, proof: Proof, results: JobResults) -> dict[str, Any]:
    """Return the JSON summary, which is the last line on stdout, without the rates."""
    manifest, model = results.manifest, context.model
    return {
        "status": outcome.status,
        "exit_code": int(outcome.exit_code),
        "reason": outcome.reason,
        "samples": proof.total,
        "rows": proof.rows,
        "ok": proof.rows - proof.errors,
        "errors": proof.errors,
        "missing": proof.missing,
        "duplicates": proof.duplicates,
        "left_out": manifest.left_out,
        "predictions": [proof.rows, *manifest.row_shape],
        **({} if model.num_classes is not None else {"columns": [each.name for each in context.types]}),
        **({} if context.bitwise else {"bitwise": False}),
        **_of_job(context, results),
        "weights": manifest.weights,
        "world_size": context.world.size,
        "batch_size": manifest.batch_size,
        "device": manifest.fingerprint["runtime.device"],
        "precision": manifest.fingerprint["runtime.precision"],
        "run_dir": str(results.home),
        "next": outcome.next_command,
    }


def _of_job(context: JobContext, results: JobResults) -> dict[str, Any]:
    """Facts that the JSON summary and `metrics.json` share."""
    return {
        "changed": len(context.claim.changed),
        "transform": str(context.resolved.transform),
        "accuracy": results.stats.accuracy,
        "all_starts": metrics.all_starts(results.manifest),
    }


def _write_metrics(context: JobContext, ranks: Sequence[metrics.RankMetrics], results: JobResults) -> dict[str, Any]:
    """Write `metrics.json` and return the rates for the summary."""
    manifest, stats = results.manifest, results.stats
    # Ranks past the first one that stopped predicted rows that nobody keeps.
    rows = sum(rank.rows for rank in ranks) if manifest.complete else manifest.prefix - context.claim.prefix
    return metrics.write_metrics(
        results.run_dir,
        ranks,
        rows=rows,
        deterministic=context.config.runtime.deterministic,
        of_job={**_of_job(context, results), "accuracy_per_class": stats.per_class(results.classes)},
    )
