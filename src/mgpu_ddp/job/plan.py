"""Which windows a job has, and what `dry_run` prints of them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mgpu_ddp.config.resolved import Resolved
from mgpu_ddp.config.schema import Config, dataset_range
from mgpu_ddp.data.datasets import open_samples
from mgpu_ddp.distributed.sharding import Plan
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import Exit, plural
from mgpu_ddp.inference.pipeline import held_batches
from mgpu_ddp.job.context import Setup
from mgpu_ddp.loader.loader import piece_rows
from mgpu_ddp.output.columns import ColumnType
from mgpu_ddp.reporting import console
from mgpu_ddp.reporting.terminal import print_lines

log = logging.getLogger("mgpu_ddp")

WINDOW_BYTES = 64 << 20
"""Size of the rows that travel to rank 0 in one window, from all ranks together."""
WARNED_FACTOR = 8
"""A warning is due where what all ranks read ahead makes windows of more than so many times `WINDOW_BYTES`."""
BOXES_TOGETHER = 256
"""Boxes of a block or more: one image in so many is decoded on two ranks."""
STRETCH_BYTES = 8 << 20
"""Size of the rows that one rank writes itself in one window."""


def batch_size_of(config: Config, batch_size: int, length: int) -> int:
    """The batch size, at most the number of samples: every batch is padded to it."""
    return max(1, min(batch_size, length, length if config.limit is None else config.limit))


def row_bytes(types: Sequence[ColumnType]) -> int:
    """About how many bytes one row takes on its way."""
    return 64 + sum(each.num_bytes for each in types)


@dataclass(frozen=True, kw_only=True, slots=True)
class Planner:
    """Plans the windows of a job's tasks."""

    config: Config
    resolved: Resolved
    types: tuple[ColumnType, ...]
    """The columns of a row."""
    world: World
    carried_bytes: int = 0
    """About how many bytes a row's source carries into it."""

    def plan(self, start: int, stop: int) -> Plan:
        """Windows over [start, stop) as the job asks for them. Collective: every rank calls this."""
        return self._plan(start, stop, contiguous=self.resolved.collect == "shards", block=self._block)

    @property
    def _block(self) -> int:
        """`loader.block`; of boxes, where none is given, by the batch size, which the manifest keeps."""
        block, batch_size = self.config.loader.block, self.resolved.batch_size
        return -(-BOXES_TOGETHER // batch_size) * batch_size if self.config.boxes and block == 1 else block

    def plan_few(self, number: int) -> Plan:
        """Windows over a few samples that lie apart, numbered from 0. Collective: every rank calls this."""
        return self._plan(0, number, contiguous=False, block=1)

    def _plan(self, start: int, stop: int, *, contiguous: bool, block: int) -> Plan:
        smallest, largest = self._window_rows(contiguous=contiguous)
        return Plan(
            start=start,
            stop=stop,
            size=self.world.size,
            batch_size=self.resolved.batch_size,
            contiguous=contiguous,
            smallest_rows=smallest,
            largest_rows=largest,
            block=block,
        )

    def _window_rows(self, *, contiguous: bool) -> tuple[int, int]:
        """The fewest and the most rows of a window."""
        config, resolved, world = self.config, self.resolved, self.world
        if config.output.commit_every != "auto":
            return int(config.output.commit_every), int(config.output.commit_every)
        ahead = (resolved.workers * config.loader.prefetch + 1) * piece_rows(resolved)
        ahead += held_batches(resolved, world) * resolved.batch_size
        smallest = max(world.exchange("rows read ahead", ahead)) * world.size
        budget = STRETCH_BYTES * world.size if contiguous else WINDOW_BYTES
        largest = budget // (row_bytes(self.types) + self.carried_bytes)
        if not contiguous and smallest > WARNED_FACTOR * largest:
            log.warning(
                "the smallest window of %d ranks is %s rows, which all travel to rank 0: set output.collect=shards",
                world.size,
                f"{smallest:,}",
            )
        return smallest, largest


def dry_run(setup: Setup) -> dict[str, Any]:
    """Print the plan of a fresh start and touch nothing. Collective: every rank calls this."""
    job, world, types = setup.job, setup.world, setup.types
    with world.together("open the samples"):
        length, carried_bytes = 0, 0
        if world.rank == 0:
            samples = open_samples(job.config, setup.files)
            length, carried_bytes = len(samples), samples.carried_bytes
    start, stop, carried_bytes = world.share("samples", (*dataset_range(job.config, length), carried_bytes))
    planner = Planner(config=job.config, resolved=setup.resolved, types=types, world=world, carried_bytes=carried_bytes)
    plan = planner.plan(start, stop)
    summary = {
        "status": "planned",
        "exit_code": int(Exit.COMPLETE),
        "samples": stop - start,
        "weights": setup.resolved.weights,
        "run_dir": str(job.run_dir),
    }
    if world.rank == 0:
        print_lines(describe_plan(setup, plan, row_bytes(types) + carried_bytes))
        console.print_summary(summary)
    return summary


def describe_plan(setup: Setup, plan: Plan, bytes_per_row: int) -> list[str]:
    job, device = setup.job, setup.world.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rows = plan.stop - plan.start
    number, grows = -(-rows // plan.smallest), plan.smallest != plan.largest
    most, least = ("at most ", "at least ") if grows else ("", "")
    windows = f"{most}{number:,}, of {least}{plan.smallest:,} rows" if number > 1 else f"{number}"
    num_bytes = rows * bytes_per_row
    return [
        f"run folder     {job.run_dir}",
        f"samples        {rows:,} ({plan.start:,} to {plan.stop:,})",
        f"rows per rank  {', '.join(f'{plan.count(rank):,}' for rank in range(plan.size))}",
        f"windows        {windows}",
        f"device         {name}, {plural(plan.size, 'process')}, precision {setup.resolved.precision}",
        f"preprocessing  {setup.resolved.transform}",
        f"output         {job.config.output.format}, about {num_bytes / 2**20:,.1f} MiB before compression",
    ]
