"""The story, top to bottom: join → configure → load → find → claim → shard → predict → collect → report.

torchrun --standalone --nproc_per_node=4 -m mgpu_ddp.infer [key=value ...] [--multirun]
"""

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch.distributed.elastic.multiprocessing.errors import record

from mgpu_ddp import config, interrupts, keys, report
from mgpu_ddp.arrow import keep_pandas_out
from mgpu_ddp.collect import Collector, Ending
from mgpu_ddp.command import Command, check_command, explain, make_folder, register_resolvers, remove_empty
from mgpu_ddp.config import Config
from mgpu_ddp.datasets import find_listing
from mgpu_ddp.decoding import decode_of, warm_up
from mgpu_ddp.ending import finish_job, holding
from mgpu_ddp.errors import Exit, UsageError
from mgpu_ddp.isolation import run_apart
from mgpu_ddp.job import Claim, Job, claim_job, place_job
from mgpu_ddp.keeping import Kept
from mgpu_ddp.loading import load_batches, num_workers
from mgpu_ddp.models import choose_transform, load_model, prepare
from mgpu_ddp.planning import Task, collecting, dry_run, refuse_bad_samples, tasks, too_many_errors
from mgpu_ddp.predict import Clock, Predictor, held_batches, in_flight, predict
from mgpu_ddp.preprocess import Transform
from mgpu_ddp.profiling import Profile
from mgpu_ddp.session import Session
from mgpu_ddp.sharding import ShardSampler
from mgpu_ddp.signals import StopWish
from mgpu_ddp.spare import Share
from mgpu_ddp.sweep import Sweep, point_of
from mgpu_ddp.tuning import choose_compile, find_batch_size
from mgpu_ddp.world import World, choose_device, join


def infer(job: Job, world: World, stop: StopWish, kept: Kept) -> dict[str, Any]:
    """Predict every sample of a job and prove it. Collective: every rank calls this; all get the summary."""
    kept.begin()
    config = job.config
    world.pulse.timeout_s = config.dist.timeout_s
    world = choose_device(config, world)
    keep_pandas_out()
    decodes = decode_of(config, world.device) != "cpu"
    # Before there are threads and workers, which inherit it.
    interrupts.keep_off(interrupts.interrupted_cpus() if decodes else frozenset(), world.cpus)
    warm = warm_up(world.device, decodes=decodes) if world.device.type == "cuda" else None
    job = place_job(job, world)
    # Before the images are listed, which may take minutes: a model that is not there is told in seconds.
    model = kept.get("model", [config.model, config.seed, config.output.computed], lambda: load_model(config, world))
    files = find_listing(config, job.run_dir, afresh=job.starts_over, world=world)
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


def main() -> None:
    """Join the world; rank 0 reads the command and leads through its jobs, the other ranks follow."""
    # Threads that come back from a decoder or a device must not wait 5 ms for the interpreter.
    sys.setswitchinterval(0.0005)
    stop = StopWish()
    stop.install()
    try:
        world = join()
    except UsageError as mistake:
        print(f"mgpu_ddp: {mistake}", file=sys.stderr)
        sys.exit(int(Exit.USAGE))
    report.start_logging(world)
    kept = Kept()
    session = Session(world, stop, kept, lambda job: infer(job, world, stop, kept))
    error: BaseException | None = None
    try:
        if world.rank == 0:
            lead(session, sys.argv[1:])
        else:
            error = record(session.follow)()
    except Exception as raised:
        error = raised
    session.depart(error)


def lead(session: Session, argv: list[str]) -> None:
    """Check the command once, then let Hydra make its job or its jobs. Rank 0 only."""
    error: BaseException | None = None
    try:
        keys.register()
        register_resolvers()
        command = check_command(argv)
        if command.folder:
            command = replace(command, folder=session.world.first_of_launch("folder", command.folder))
            session.made = make_folder(Path(command.folder))
        if command.multirun:
            run_sweep(session, command)
        else:
            run(command, lambda cfg: session.lead(lambda: configure(cfg, in_sweep=False)))
    except BaseException as raised:
        error = raised
        raise
    finally:
        session.end(error)


def run_sweep(session: Session, command: Command) -> None:
    """Run the points of a sweep, and end with its answer. Rank 0 only."""
    sweep = Sweep(Path(command.folder), command.swept, stop_on_oom=command.stop_on_oom)

    errors: list[Exception] = []
    size = session.world.size
    remedy = "Start the sweep by python -m mgpu_ddp.infer, which starts the processes of each job."
    config.require(
        not command.isolated or size == 1, "hydra/launcher", f"basic for {size} processes", "another", remedy
    )

    def run_point(cfg: DictConfig) -> float:
        point = point_of(cfg, command.swept)

        def apart() -> dict[str, Any]:
            return run_apart(point.overrides, sweep.folder, session.stop)

        def act() -> dict[str, Any]:
            return session.lead(lambda: configure(cfg, in_sweep=True), apart if command.isolated else None)

        try:
            return sweep.run(point, act)
        except Exception as error:
            # Raised to Hydra it would come out as Hydra's own words, once for each point that is left.
            errors.append(error)
            return 0.0
        finally:
            # Hydra makes one also for a point that was refused.
            remove_empty([Path(HydraConfig.get().runtime.output_dir)])

    run(command, run_point)
    if errors and isinstance(errors[0], UsageError):
        raise errors[0]
    report.print_summary(sweep.conclude(int(Exit.FAILED) if errors else session.exit_code))
    if errors:
        raise errors[0]


def run(command: Command, act: Callable[[DictConfig], Any]) -> None:
    """Have Hydra act on a checked command. Rank 0 only."""
    # A failing job must reach `Session.depart` whole, not as Hydra's shortened print.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [sys.argv[0], *command.argv]

    @hydra.main(version_base="1.3", config_path="pkg://mgpu_ddp.conf", config_name="config")
    @record
    def task(cfg: DictConfig) -> Any:
        return act(cfg)

    try:
        task()
    except SystemExit as left:
        # Hydra's --help leaves this way, and so does its argument parser, which has said why.
        if left.code:
            raise UsageError("the command line must be one that Hydra accepts, see above. See --help.") from None
    except (HydraException, OmegaConfBaseException) as error:
        # A sweep has values that were not composed before.
        raise UsageError(explain(error, command.words)) from None


def configure(cfg: DictConfig, *, in_sweep: bool) -> Job:
    """The job that Hydra composed."""
    composed = HydraConfig.get()
    settings = config.to_config(cfg)
    if in_sweep and settings.runtime.on_oom == "auto":
        settings.runtime.on_oom = "raise"
    overrides = list(composed.overrides.task)
    return Job(
        name=str(composed.job.num) if in_sweep else "0",
        config=settings,
        run_dir=Path(settings.output.dir or composed.runtime.output_dir).absolute(),
        batch_size_given=any(override.lstrip("+").startswith("batch_size=") for override in overrides),
        in_sweep=in_sweep,
        hydra_files={"config.yaml": cfg, "hydra.yaml": composed, "overrides.yaml": composed.overrides.task},
    )


if __name__ == "__main__":
    main()
