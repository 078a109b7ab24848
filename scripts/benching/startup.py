"""From the start of torchrun to the first prediction."""

import argparse
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common.processes import ranks_below, started, torchrun
from common.showing import say

from benching.children import PEERS, ChildFailedError, check_exit, last_json
from benching.hardware import look, share
from benching.table import Row, print_machine, print_table, write_report

BATCH_SIZE = 32
POLL_S = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """One start of torchrun; each figure counts from its beginning."""

    worker_s: float
    """Until the process of rank 0 began."""
    first_s: float
    """Until the first prediction of the slowest rank that reports it."""
    wall_s: float
    """Until the end of torchrun."""


def startup(args: argparse.Namespace) -> bool:
    """Compare the time to the first prediction under torchrun with that of a bare script that predicts one batch."""
    rounds = args.rounds or (1 if args.quick else 5)
    job = ["-m", "mgpu_ddp.infer", f"data.size={BATCH_SIZE * args.gpus}", f"batch_size={BATCH_SIZE}"]
    bare = [str(PEERS / "first_batch.py"), str(BATCH_SIZE)]
    commands = {"a bare script": bare, "mgpu_ddp": job}
    start_with = torchrun("--standalone", f"--nproc_per_node={args.gpus}")
    machine = look()
    starts: dict[str, list[Start]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for place, (name, command) in enumerate(commands.items()):
            with share(machine, args.gpus):
                start = _start([*start_with, *command], args.out / f"round-{number}" / str(place))
            say(f"{f'round {number} of {rounds}' if number else 'warm-up'}: {name} {start.first_s:.2f} s")
            if number:
                starts[name].append(start)

    first = {name: [start.first_s for start in found] for name, found in starts.items()}
    medians = {name: statistics.median(found) for name, found in first.items()}
    rows = [
        Row(name=name, wall_s=[start.wall_s for start in starts[name]], value=f"{medians[name]:.2f} s to the first")
        for name in commands
    ]
    rows[1] = replace(
        rows[1],
        ratio=medians["mgpu_ddp"] / medians["a bare script"],
        rounds=[a / b for a, b in zip(first["mgpu_ddp"], first["a bare script"], strict=True)],
    )
    print_table(rows)
    details = {name: [asdict(start) for start in found] for name, found in starts.items()}
    write_report(
        args.out, {"rounds": rounds, "gpus": args.gpus}, rows, {"starts": details, "hardware": asdict(machine)}
    )
    print_machine(args.out)
    return True


def _start(command: list[str], folder: Path) -> Start:
    """Run torchrun; a rank reports how old it was at its first prediction, and the kernel when it began."""
    launched = time.clock_gettime(time.CLOCK_BOOTTIME)
    began: float | None = None
    with started(command, folder) as child:
        while child.poll() is None:
            if began is None and (rank_0 := ranks_below(child.pid).get(0)) is not None:
                began = rank_0.began_s
            time.sleep(POLL_S)
        wall_s = time.clock_gettime(time.CLOCK_BOOTTIME) - launched
    check_exit(command, folder, child.returncode)
    if began is None:
        raise ChildFailedError(f"{folder}: the process of rank 0 never appeared in /proc.")
    return Start(worker_s=began - launched, first_s=began - launched + last_json(folder)["startup_s"], wall_s=wall_s)
