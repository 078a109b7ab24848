"""What the windows themselves cost, against the number of ranks: real processes, a model that only sleeps."""

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benching.children import PEERS, run_child, say, torchrun
from benching.plot import pyplot_or_none, save
from benching.table import Row, print_machine, print_table, write_report

BATCH_SIZE, WINDOWS = 64, 40
BATCH_S = 0.25
"""What a batch takes: with one in each window, a pace that every number of ranks can keep on few cores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a window costs so many ranks."""

    ranks: int
    gather_s: float
    """From when the last rank has come to when the first has all rows: the median window."""
    worst_s: float
    """The same, of 20 windows the slowest."""
    cpu_s: float
    """CPU time of all ranks together, the loop around the protocol included."""
    others_cores: float


def protocol(args: argparse.Namespace) -> bool:
    """The protocol's own cost per window, by number of ranks, on CPUs."""
    import numpy as np

    largest = args.ranks or (4 if args.quick else 32)
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= largest]
    images = args.out / "images.npy"
    np.save(images, np.zeros((largest * BATCH_SIZE * WINDOWS, 8, 8, 3), dtype=np.uint8))
    costs: list[Cost] = []
    for size in sizes:
        costs.append(_measure(size, images, args.out / f"ranks-{size}"))
        say(f"{size} ranks: {costs[-1].gather_s * 1e3:.1f} ms a window")
    rows = [
        Row(
            name=f"{cost.ranks} ranks",
            value=f"{cost.gather_s * 1e3:.1f} ms a window, {cost.worst_s * 1e3:.1f} ms the slowest of 20, "
            f"{cost.cpu_s / cost.ranks * 1e3:.1f} ms of CPU per rank",
        )
        for cost in costs
    ]
    print_table(rows)
    settings = {"batch_size": BATCH_SIZE, "windows": WINDOWS, "batch_s": BATCH_S}
    write_report(args.out, settings, rows, {"costs": [asdict(cost) for cost in costs]})
    print_machine(args.out)
    _plot(costs, args.out / "protocol.png")
    return True


def _measure(size: int, images: Path, folder: Path) -> Cost:
    notes = folder.with_name(f"{folder.name}-notes")
    notes.mkdir()
    settings = [
        *("data=array", f"data.path={images}", "transform=plain", "transform.size=8", "loader.workers=0"),
        *(f"batch_size={BATCH_SIZE}", f"limit={size * BATCH_SIZE * WINDOWS}", f"output.dir={folder}/run"),
        f"output.commit_every={size * BATCH_SIZE}",
    ]
    command = [*torchrun(size), str(PEERS / "sleeping.py"), str(notes), f"{BATCH_S}", *settings]
    measured = run_child(command, folder)
    found = [json.loads((notes / f"rank{rank}.json").read_text()) for rank in range(size)]
    # The rank that came last waited for nobody.
    alone = sorted(min(window) for window in zip(*(each["gathered_s"] for each in found), strict=False))
    windows = min(each["windows"] for each in found)
    return Cost(
        ranks=size,
        gather_s=statistics.median(alone),
        worst_s=alone[max(0, len(alone) - 1 - len(alone) // 20)],
        cpu_s=sum(each["cpu_s"] for each in found) / windows,
        others_cores=measured.others_cores or 0.0,
    )


def _plot(costs: Sequence[Cost], path: Path) -> None:
    if (pyplot := pyplot_or_none()) is None:
        return
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    ranks = [cost.ranks for cost in costs]
    axes.plot(ranks, [cost.gather_s * 1e3 for cost in costs], "o-", color="#2a6f97", label="a window, last to first")
    axes.plot(ranks, [cost.worst_s * 1e3 for cost in costs], "o:", color="#2a6f97", label="the slowest of 20")
    per_rank = [cost.cpu_s / cost.ranks * 1e3 for cost in costs]
    axes.plot(ranks, per_rank, "s-", color="#e07a5f", label="CPU time of each rank")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.set_yscale("log")
    axes.set_xlabel(f"ranks, on {len(os.sched_getaffinity(0))} CPUs")
    axes.set_ylabel("ms per window")
    axes.set_title(f"Windows of {BATCH_SIZE} rows per rank, gloo on one host", fontsize=10, loc="left")
    axes.grid(which="both", alpha=0.3)
    axes.legend(frameon=False)
    save(figure, path)
