"""The command line as a process lives it: join → check → Hydra → a job, or the jobs of a sweep → leave."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch.distributed.elastic.multiprocessing.errors import record

from mgpu_ddp.config.checks import require
from mgpu_ddp.config.command_line import Command, check_command, explain, register_resolvers
from mgpu_ddp.config.help import register
from mgpu_ddp.config.schema import to_config
from mgpu_ddp.distributed.signals import StopWish
from mgpu_ddp.distributed.world import World, join
from mgpu_ddp.errors import Exit, UsageError
from mgpu_ddp.job.cache import Kept
from mgpu_ddp.job.job import Job
from mgpu_ddp.job.session import Session
from mgpu_ddp.output.run_folder import make_folder, remove_empty
from mgpu_ddp.reporting import console
from mgpu_ddp.sweep.isolated import run_apart
from mgpu_ddp.sweep.sweep import Sweep, point_of

Infer = Callable[[Job, World, StopWish, Kept], dict[str, Any]]


def main(infer: Infer) -> None:
    """Join the world; rank 0 reads the command and leads through its jobs by `infer`, the other ranks follow."""
    # Threads that come back from a decoder or a device must not wait 5 ms for the interpreter.
    sys.setswitchinterval(0.0005)
    stop = StopWish()
    stop.install()
    try:
        world = join()
    except UsageError as mistake:
        print(f"mgpu_ddp: {mistake}", file=sys.stderr)
        sys.exit(int(Exit.USAGE))
    console.start_logging(world)
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
        register()
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
    require(not command.isolated or size == 1, "hydra/launcher", f"basic for {size} processes", "another", remedy)

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
    console.print_summary(sweep.conclude(int(Exit.FAILED) if errors else session.exit_code))
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
    settings = to_config(cfg)
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
