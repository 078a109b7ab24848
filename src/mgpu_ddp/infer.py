"""The story: set up → claim the run folder → predict and collect each task → finish.

torchrun --standalone --nproc_per_node=4 -m mgpu_ddp.infer [key=value ...] [--multirun]
"""

from typing import Any

from mgpu_ddp import cli
from mgpu_ddp.config.script import Script
from mgpu_ddp.distributed.signals import StopWish
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import Exit
from mgpu_ddp.job.agreement import Ending
from mgpu_ddp.job.cache import Kept
from mgpu_ddp.job.claim import claim_job
from mgpu_ddp.job.context import JobContext
from mgpu_ddp.job.finish import finish_job
from mgpu_ddp.job.job import Job
from mgpu_ddp.job.plan import dry_run
from mgpu_ddp.job.session import end_process
from mgpu_ddp.job.setup import begin, set_up
from mgpu_ddp.job.tasks import collecting, predict_task, profiled, tasks, too_many_errors


def infer(job: Job, world: World, stop: StopWish, kept: Kept) -> dict[str, Any]:
    """Predict every sample of a job and prove it. Collective: every rank calls this; all get the summary."""
    setup = set_up(job, world, kept)
    if job.config.dry_run:
        return dry_run(setup)
    with setup.folder:
        claim = claim_job(setup)
        context = begin(setup, claim, stop)
        ending = predict_all(context)
        return finish_job(context, ending)


def predict_all(context: JobContext) -> Ending:
    """Predict and collect each task, until one ends otherwise than complete. Collective: every rank calls this."""
    if too_many_errors(context):
        return "too many errors"
    with profiled(context):
        for task in tasks(context):
            with collecting(context, task) as collector:
                predict_task(context, task, collector)
            if collector.ending != "complete":
                return collector.ending
    return "complete"


if __name__ == "__main__":
    cli.main(infer, Script())
    end_process(Exit.COMPLETE)
