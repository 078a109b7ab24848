"""The run of one process: join → check the command line → Hydra → a job, or the jobs of a sweep → leave."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch.distributed.elastic.multiprocessing.errors import record

from mgpu_ddp.config.checks import require
from mgpu_ddp.config.command_line import Command, check_command
from mgpu_ddp.config.compose import VERSION_BASE, explain, register
from mgpu_ddp.config.schema import to_config
from mgpu_ddp.config.script import Script
from mgpu_ddp.distributed.command import start_command
from mgpu_ddp.distributed.signals import StopWish
from mgpu_ddp.distributed.world import World, join
from mgpu_ddp.errors import Exit, UsageError
from mgpu_ddp.job.cache import Kept
from mgpu_ddp.job.job import Job
from mgpu_ddp.job.next_command import next_words, shell_line
from mgpu_ddp.job.session import Session
from mgpu_ddp.output.folders import check_utf8, make_folder, remove_empty
from mgpu_ddp.reporting import console
from mgpu_ddp.reporting.terminal import make_output_safe, print_mistake
from mgpu_ddp.sweep.isolated import run_isolated
from mgpu_ddp.sweep.sweep import Point, Sweep, point_of
from mgpu_ddp.version import version_text

Infer = Callable[[Job, World, StopWish, Kept], dict[str, Any]]


def main(infer: Infer, script: Script) -> dict[str, Any]:
    """Join the world; rank 0 reads the command and leads through its jobs by `infer`, the other ranks follow.

    Returns the summary of the last job if all are complete, and nothing where none was asked for. Otherwise the process
    ends.
    """
    make_output_safe()
    argv = sys.argv
    # A thread that returns from a decoder or a device must not wait 5 ms, the default, for the GIL.
    sys.setswitchinterval(0.0005)
    start = start_command()
    stop = StopWish()
    stop.install()
    try:
        world = join()
    except UsageError as mistake:
        print_mistake(mistake)
        sys.exit(int(Exit.USAGE))
    console.start_logging(world)
    kept = Kept()
    session = Session(world, stop, kept, script, lambda job: infer(job, world, stop, kept), start)
    error: BaseException | None = None
    try:
        if world.rank == 0:
            lead(session, sys.argv[1:])
        else:
            error = record(session.follow)()
    except Exception as raised:
        error = raised
    session.depart(error)
    sys.argv = argv
    stop.uninstall()
    return session.outcomes[-1] if session.outcomes else {}


def lead(session: Session, argv: list[str]) -> None:
    """Check the command once, then let Hydra make its job or its jobs. Rank 0 only."""
    error: BaseException | None = None
    try:
        register()
        command = check_command(session.script.with_options(argv))
        if "--version" in command.words:
            print(version_text(), flush=True)
            return
        if command.folder:
            check_utf8("hydra.sweep.dir" if command.multirun else "output.dir", command.folder)
            command = replace(command, folder=session.world.first_of_launch("folder", command.folder))
            session.made = [] if command.dry_run else make_folder(Path(command.folder))
        if command.multirun:
            run_sweep(session, command)
        else:
            run_hydra(command, partial(run_job, session, command))
    except BaseException as raised:
        error = raised
        raise
    finally:
        session.end(error)


def run_hydra(command: Command, act: Callable[[DictConfig], Any]) -> None:
    """Have Hydra act on each configuration that a checked command composes. Rank 0 only."""
    # Hydra raises a job's error, instead of printing a shortened traceback and exiting: `Session.depart` needs it.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [sys.argv[0], *command.argv]
    start = hydra.main(config_path="pkg://mgpu_ddp.conf", config_name="config", **VERSION_BASE)
    try:
        start(record(act))()
    except SystemExit as left:
        # Hydra's --help leaves this way, and so does its argument parser, which has said why.
        if left.code:
            raise UsageError("the command line must be one that Hydra accepts, see above. See --help.") from None
    except (HydraException, OmegaConfBaseException) as error:
        # A sweep has values that were not composed before.
        raise UsageError(explain(error)) from None


def run_job(session: Session, command: Command, cfg: DictConfig) -> None:
    """Run the one job of a command. Rank 0 only."""
    session.lead(partial(configure, cfg, session, command, command.folder))


def run_sweep(session: Session, command: Command) -> None:
    """Run the points of a sweep, and end with its answer. Rank 0 only."""
    size = session.world.size
    remedy = "Start the sweep by python -m mgpu_ddp.infer, which starts the processes of each job."
    require(not command.isolated or size == 1, "hydra/launcher", f"basic for {size} processes", "another", remedy)
    points = Points(session, command)
    run_hydra(command, points.run)
    if isinstance(points.error, UsageError):
        raise points.error
    code = int(Exit.FAILED) if points.error else session.exit_code
    folder, start = Path(command.folder), session.start
    again = None if code == Exit.COMPLETE or start is None else shell_line(start, next_words(start, folder, sweep=True))
    console.print_summary(points.sweep.conclude(code) | {"next": again})
    if points.error is not None:
        raise points.error


class Points:
    """The points of a sweep, each run as Hydra composes it. Rank 0 only."""

    def __init__(self, session: Session, command: Command) -> None:
        self._session, self._command = session, command
        self.sweep = Sweep(Path(command.folder), command.swept, stop_on_oom=command.stop_on_oom)
        self.error: Exception | None = None
        """The first that was raised. Hydra, if it saw it, would print it in its own way, once for each point left."""

    def run(self, cfg: DictConfig) -> float:
        """Run a point, and return its images/s for the sweeper."""
        point = point_of(cfg, self._command.swept)
        try:
            return self.sweep.run(point, partial(self._run_job, cfg, point))
        except Exception as error:
            self.error = self.error or error
            return 0.0
        finally:
            # Hydra makes this folder for a refused point as well.
            remove_empty([Path(HydraConfig.get().runtime.output_dir)])

    def _run_job(self, cfg: DictConfig, point: Point) -> dict[str, Any]:
        session = self._session
        make = partial(configure, cfg, session, self._command, HydraConfig.get().runtime.output_dir)
        if not self._command.isolated:
            return session.lead(make)
        words = point.overrides
        if self._command.config_dir is not None:
            words = [f"--config-dir={self._command.config_dir}", *words]
        start, folder = session.start, self.sweep.folder
        again = [] if start is None else next_words(start, folder, sweep=True)
        return session.lead(make, partial(run_isolated, session.script.start, words, again, folder, session.stop))


def configure(cfg: DictConfig, session: Session, command: Command, folder: str) -> Job:
    """Make the job that Hydra composed, in a folder unless another is configured."""
    in_sweep = command.multirun
    composed = HydraConfig.get()
    settings = to_config(cfg)
    if in_sweep and settings.runtime.on_oom == "auto":
        settings.runtime.on_oom = "raise"
    overrides = list(composed.overrides.task)
    run_dir = Path(settings.output.dir or folder).absolute()
    check_utf8("output.dir", str(run_dir))
    return Job(
        name=str(composed.job.num) if in_sweep else "0",
        config=settings,
        run_dir=run_dir,
        batch_size_given=any(override.lstrip("+").startswith("batch_size=") for override in overrides),
        in_sweep=in_sweep,
        start=session.start,
        sweep_dir=command.folder if in_sweep else None,
        script=session.script,
        hydra_files={"config.yaml": cfg, "hydra.yaml": composed, "overrides.yaml": composed.overrides.task},
    )
