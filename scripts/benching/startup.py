"""From the start of torchrun to the first prediction."""

import argparse
import os
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benching.children import (
    PEERS,
    ChildFailedError,
    check_exit,
    environment,
    last_json,
    rank_0_below,
    say,
    stat_fields,
    torchrun,
)
from benching.hardware import look, share
from benching.table import Row, print_machine, print_table, write_report

BATCH_SIZE = 32
POLL_S = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """One start of torchrun."""

    worker_s: float
    """Until the process of rank 0 started."""
    first_s: float
    """Until the first prediction of the slowest rank that says when it was."""
    wall_s: float
    """Until torchrun ended."""


def startup(args: argparse.Namespace) -> bool:
    """Time to the first prediction under torchrun, beside a bare script that predicts one batch."""
    rounds = args.rounds or (1 if args.quick else 5)
    job = ["-m", "mgpu_ddp.infer", f"data.size={BATCH_SIZE * args.gpus}", f"batch_size={BATCH_SIZE}"]
    bare = [str(PEERS / "first_batch.py"), str(BATCH_SIZE)]
    commands = {"a bare script": bare, "mgpu_ddp": job}
    machine = look()
    starts: dict[str, list[Start]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for place, (name, command) in enumerate(commands.items()):
            with share(machine, args.gpus):
                start = _start([*torchrun(args.gpus), *command], args.out / f"round-{number}" / str(place))
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
    """Run torchrun; the processes say how old they were at their first prediction, and the kernel when they began."""
    folder.mkdir(parents=True)
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        launched = time.clock_gettime(time.CLOCK_BOOTTIME)
        child = subprocess.Popen(command, cwd=folder, env=environment(), stdout=out, stderr=err)
        began: float | None = None
        try:
            while child.poll() is None:
                if began is None and (pid := rank_0_below(child.pid)) is not None:
                    began = _began(pid)
                time.sleep(POLL_S)
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
    wall_s = time.clock_gettime(time.CLOCK_BOOTTIME) - launched
    check_exit(command, folder, child.returncode)
    if began is None:
        raise ChildFailedError(f"{folder}: the process of rank 0 must be seen in /proc, and never was.")
    return Start(worker_s=began - launched, first_s=began - launched + last_json(folder)["startup_s"], wall_s=wall_s)


def _began(pid: int) -> float | None:
    """When a process started, on CLOCK_BOOTTIME. Source: proc(5), field 22 of /proc/PID/stat."""
    try:
        return int(stat_fields(Path("/proc") / str(pid))[19]) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return None
