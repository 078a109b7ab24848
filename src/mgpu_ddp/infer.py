"""The story, top to bottom: join → configure → load → find → claim → shard → predict → collect → report.

torchrun --standalone --nproc_per_node=4 -m mgpu_ddp.infer [key=value ...] [--multirun]
"""

from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from typing import Any

from mgpu_ddp import cli
from mgpu_ddp.config.schema import Config
from mgpu_ddp.data.datasets import find_listing
from mgpu_ddp.distributed import host
from mgpu_ddp.distributed.devices import choose_device
from mgpu_ddp.distributed.sharding import ShardSampler
from mgpu_ddp.distributed.signals import StopWish
from mgpu_ddp.distributed.world import World
from mgpu_ddp.inference.clock import Clock
from mgpu_ddp.inference.gpu_input import decode_of, warm_up
from mgpu_ddp.inference.pipeline import held_batches, in_flight, predict
from mgpu_ddp.inference.predictor import Predictor
from mgpu_ddp.inference.trace import Profile
from mgpu_ddp.job.autotune import choose_compile, find_batch_size
from mgpu_ddp.job.cache import Kept
from mgpu_ddp.job.claim import Claim, claim_job, known_listing, place_job
from mgpu_ddp.job.collector import Collector, Ending
from mgpu_ddp.job.finish import finish_job, holding
from mgpu_ddp.job.job import Job
from mgpu_ddp.job.plan import dry_run
from mgpu_ddp.job.tasks import Task, collecting, refuse_bad_samples, tasks, too_many_errors
from mgpu_ddp.loader.loader import load_batches, num_workers
from mgpu_ddp.loader.spare import Share
from mgpu_ddp.models.build import choose_transform, load_model
from mgpu_ddp.models.prepare import prepare
from mgpu_ddp.output.arrow import keep_pandas_out
from mgpu_ddp.preprocess.transform import Transform


def infer(job: Job, world: World, stop: StopWish, kept: Kept) -> dict[str, Any]:
    """Predict every sample of a job and prove it. Collective: every rank calls this; all get the summary."""
    kept.begin()
    config = job.config
    world.pulse.timeout_s = config.dist.timeout_s
    world = choose_device(config, world)
    keep_pandas_out()
    decodes = decode_of(config, world.device) != "cpu"
    # Before there are threads and workers, which inherit it.
    host.keep_off(host.interrupted_cpus() if decodes else frozenset(), world.cpus)
    warm = warm_up(world.device, decodes=decodes) if world.device.type == "cuda" else None
    job = place_job(job, world)
    # Before the images are listed, which may take minutes: a model that is not there is told in seconds.
    model = kept.get("model", [config.model, config.seed, config.output.computed], lambda: load_model(config, world))
    files = find_listing(config, known_listing(job, world), world)
    if config.dry_run:
        return dry_run(job, model, files, world)
    transform = choose_transform(config, model)

    def warmed(chosen: Config, *, keep: bool = True) -> Predictor:
        def ready() -> Predictor:
            return Predictor(prepare(model, chosen, world, keep=keep), transform, chosen, world.device)

        predictor = kept.get("predictor", Predictor.depends_on(chosen, transform, world.device), ready)
        if warm is not None:
            # Before a graph is recorded, which another thread's work would spoil, and before the loader forks: a
            # thread amid its imports would leave their locks held in the workers.
            warm.result()
        return predictor

    job = choose_compile(job, model, files, transform, world, warmed)
    batch_size = find_batch_size(job, transform, world, warmed)
    claim = claim_job(job, batch_size, model, transform, files, world)
    with holding(claim):
        predictor = warmed(job.config, keep=job.in_sweep)
        clock = Clock(warm_up=in_flight(world), began=kept.began, reused=tuple(kept.reused))
        ending: Ending = "too many errors" if too_many_errors(job, claim) else "complete"
        left = tasks(job, claim, model, world)
        with profiled(job, claim, world, clock):
            while ending == "complete" and (task := next(left, None)) is not None:
                with collecting(job, task, claim, model, transform, world, stop, clock) as collector:
                    predict_task(job, task, claim, predictor, transform, world, clock, collector)
                ending = collector.ending
        return finish_job(job, claim, model, world, clock, ending)


def profiled(job: Job, claim: Claim, world: World, clock: Clock) -> AbstractContextManager[None]:
    """Trace some of the batches in the block, where that was asked for."""
    if not job.config.runtime.profile:
        return nullcontext()
    num_batches = (claim.stop - claim.prefix) // (world.size * claim.batch_size)
    profile = Profile(world, claim.folder, num_batches)
    clock.on_batch = profile.step
    return profile.tracing()


def predict_task(
    job: Job,
    task: Task,
    claim: Claim,
    predictor: Predictor,
    transform: Transform,
    world: World,
    clock: Clock,
    collector: Collector,
) -> None:
    """Predict this rank's share of a task, with nothing collective in the loop."""
    loaded = load_batches(
        task.samples,
        ShardSampler(task.plan, world.rank),
        transform,
        replace(job.config.loader, workers=num_workers(job.config, world)),
        claim.batch_size,
        world,
        held=held_batches(job.config, claim.batch_size, world),
        packed=predictor.decodes,
        share=None if job.config.runtime.deterministic else Share(lambda: (clock.wait_s, clock.input_s)),
    )
    with loaded as batches, closing(predict(batches, predictor, clock, world)) as predicted:
        for rows in predicted:
            refuse_bad_samples(rows, job, task.samples)
            collector.add(rows)
            if collector.over:
                return


if __name__ == "__main__":
    cli.main(infer)
