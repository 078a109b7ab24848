"""The same jobs on 1, 2, 4 and 8 GPUs with as many cores for each: what more GPUs bring, and what limits them.

Weak scaling gives each GPU the same rows, strong scaling shares out the rows of the largest weak job, so that the two
meet at the most GPUs. Rates are the jobs' own, after their first batches. A machine without GPUs has ranks of one core.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benching.arrays import make_array
from benching.children import ChildFailedError, Measurement, say, torchrun
from benching.contenders import Contender, Found, goes_on, measure, since
from benching.hardware import Hardware, cores_each, describe, look
from benching.jpegs import make_folder, work_folder
from benching.plot import pyplot_or_none, save
from benching.table import Row, compare, print_columns, print_machine, print_table, write_report

SPEEDUPS, JUDGED = {2: 1.9, 4: 3.7, 8: 7.2}, ("jpegs", "array")
"""The project's bars: times one GPU by number of GPUs, and for which images."""
COLLECTING, COLLECTING_AT = 0.03, 8
"""The share of rank 0's time that may go to gathering and writing, and at how many GPUs."""
COUNTS = (1, 2, 4, 8)
SCALINGS = ("weak", "strong")
ROWS = {"jpegs": 400_000, "array": 200_000, "fake": 40_000}
"""Of each GPU: ten seconds of JPEGs, lest what differs between the starts of the ranks count."""
KINDS = {"jpegs": "JPEGs", "array": "decoded images", "fake": "FakeData"}
COLOURS = {"jpegs": "#2a6f97", "array": "#e07a5f", "fake": "#81b29a"}
DISTINCT = 16_000
BINDING = "--numa-binding=node"
SPENT = (
    "loop s",
    "wait",
    "input",
    "predict",
    "peers",
    "workers",
    "rank 0: gather",
    "write",
    "of its loop",
    "limit",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """Where images come from, and how many."""

    name: str
    rows_each: int
    """Of each GPU where the scaling is weak."""
    batch_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """A job on so many GPUs."""

    kind: Kind
    gpus: int
    rows: int
    bound: bool = False
    """Each rank to the NUMA node of its GPU."""

    @property
    def name(self) -> str:
        return f"{self.kind.name}-{self.rows}-on-{self.gpus}{'-bound' if self.bound else ''}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is measured on what."""

    hardware: Hardware
    counts: list[int]
    """Of GPUs, ascending from 1."""
    shares: int
    """Into how many the cores are split: one for each GPU of this machine, or for each core where it has none."""
    cores: int
    """Of each rank."""
    scalings: list[str]
    numa: bool
    kinds: list[Kind]
    judged: bool
    """Whether the bars apply."""

    def turns(self, kind: Kind, scaling: str) -> list[Turn]:
        """One for each number of GPUs."""
        each = [count if scaling == "weak" else self.counts[-1] for count in self.counts]
        return [
            Turn(kind=kind, gpus=gpus, rows=shares * kind.rows_each)
            for gpus, shares in zip(self.counts, each, strict=True)
        ]

    def pairs(self, kind: Kind) -> list[tuple[Turn, Turn]]:
        """Each job with the same one bound to NUMA nodes, where that was asked for."""
        return [(turn, replace(turn, bound=True)) for turn in self.turns(kind, self.scalings[0]) if self.numa]

    def once(self) -> list[Turn]:
        """Every job once, in the order of a round."""
        turns: list[Turn] = []
        for kind in self.kinds:
            turns += (turn for scaling in self.scalings for turn in self.turns(kind, scaling))
            turns += (bound for _, bound in self.pairs(kind))
        return list(dict.fromkeys(turns))

    def title(self, turn: Turn, scaling: str = "") -> str:
        """What a turn is called, as part of a scaling or by its rows."""
        ranks = f"{turn.gpus} {'GPU' if self.hardware.gpus else 'rank'}{'s' if turn.gpus > 1 else ''}"
        what = scaling or f"{turn.rows:,} rows{', bound' if turn.bound else ''}"
        return f"{KINDS[turn.kind.name]}, {what}, {ranks}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Spent:
    """Where the time of one run went by its metrics.json; seconds are the mean of its ranks unless said otherwise."""

    images_per_s: float
    loop_s: float
    """From the first prediction to the end of the loop."""
    wait_s: float
    """Waiting for the loader, also before the first prediction."""
    input_s: float
    predict_s: float
    peers_s: float
    workers_s: dict[str, float]
    """Of one rank's workers together, per stage."""
    gather_s: float
    """Of rank 0's collecting thread, waiting for slower ranks included."""
    write_s: float
    """Of rank 0's collecting thread."""
    collecting: float
    """Share of rank 0's loop that its collecting thread gathered or wrote."""
    bottleneck: str
    ranks: list[dict[str, Any]]


def scaling(args: argparse.Namespace) -> bool:
    """JPEGs, decoded images and FakeData on 1, 2, 4 and 8 GPUs (or, to try it, cores), weak and strong."""
    started = time.perf_counter()
    plan = _plan(args, look())
    work = work_folder(args.work)
    images = {kind: _images(kind, plan, work, quick=args.quick) for kind in plan.kinds}
    contenders = {turn: _contender(turn, images[turn.kind], plan) for turn in plan.once()}
    found = {turn: Found() for turn in contenders}
    rounds = args.rounds or (1 if args.quick else 3)
    say(f"{len(contenders)} jobs a round, {since(started)}")

    def report() -> list[Row]:
        rows = [row for kind in plan.kinds for row in _rows(kind, plan, found)]
        spent = {turn.name: [asdict(_spent(m)) for m in result.measured] for turn, result in found.items()}
        results = {turn.name: asdict(result) for turn, result in found.items()}
        settings = {**asdict(plan), "rounds": rounds, "quick": args.quick}
        details = {"hardware": settings.pop("hardware"), "contenders": results, "spent": spent}
        write_report(args.out, settings, rows, details)
        return rows

    if plan.hardware.gpus:
        # Fills the caches of files and of compiled kernels; what comes first must not pay for what comes later.
        for turn in (plan.turns(kind, "weak")[-1] for kind in plan.kinds):
            measure(contenders[turn], Found(), plan.hardware, args.out / "warm-up" / turn.name)
    for number in range(1, rounds + 1):
        round_started = time.perf_counter()
        for turn, contender in contenders.items():
            if found[turn].problem:
                continue
            say(f"round {number} of {rounds}, {since(started)}: {contender.title}")
            folder = args.out / f"round-{number}" / turn.name
            measure(contender, found[turn], plan.hardware, folder, cpu_shares=plan.shares)
            report()
        if not goes_on(number, rounds, started, time.perf_counter() - round_started, args.minutes):
            break

    print_table(report())
    print()
    print_columns([("", *SPENT), *(line for kind in plan.kinds for line in _limits(kind, plan, found))])
    print(f"\n{describe(plan.hardware)}; cores of each rank: {plan.cores}; {since(started)}")
    print_machine(args.out)
    _plot(plan, found, args.out / "scaling.png")
    return not any(result.problem for result in found.values())


def _plan(args: argparse.Namespace, hardware: Hardware) -> Plan:
    """Decide what is measured.

    Raises:
        ChildFailedError: this machine has not what the command line asks for.
    """
    shares = len(hardware.gpus) or len(os.sched_getaffinity(0))
    counts = sorted(set(args.gpus or [count for count in COUNTS if count <= shares]))
    if counts[0] != 1 or counts[-1] > shares:
        raise ChildFailedError(f"--gpus must have 1, to compare with, and at most {shares}, which are here.")
    if args.numa and not (hardware.gpus and shutil.which("numactl")):
        raise ChildFailedError(f"--numa must find GPUs and numactl, which torchrun {BINDING} calls.")
    return Plan(
        hardware=hardware,
        counts=counts,
        shares=shares,
        cores=cores_each(shares),
        scalings=args.scalings or list(SCALINGS),
        numa=args.numa,
        kinds=_kinds(args, on_gpu=bool(hardware.gpus)),
        judged=bool(hardware.gpus) and not args.quick,
    )


def _kinds(args: argparse.Namespace, *, on_gpu: bool) -> list[Kind]:
    if on_gpu:
        rows = {"jpegs": 20_000, "array": 20_000, "fake": 5000} if args.quick else ROWS
    else:
        rows = dict.fromkeys(KINDS, 48 if args.quick else 500)
    sizes = {"array": 512} if on_gpu else dict.fromkeys(KINDS, 8 if args.quick else 32)
    return [
        Kind(name=name, rows_each=args.images or rows[name], batch_size=sizes.get(name, 256))
        for name in KINDS
        if not args.only or name in args.only
    ]


def _images(kind: Kind, plan: Plan, work: Path, *, quick: bool) -> list[str]:
    """Make the images of the largest job and say how a job names them."""
    largest = plan.counts[-1] * kind.rows_each
    common = [f"batch_size={kind.batch_size}"]
    if kind.name == "fake":
        return [f"data.size={largest}", *common]
    if kind.name == "jpegs":
        root, _ = make_folder(work, images=largest, distinct=2000 if quick else DISTINCT)
        return ["data=folder", f"data.root={root}", *common]
    array = work / f"array-{largest}.npy"
    make_array(array, largest)
    return ["data=array", f"data.path={array}", *common]


def _contender(turn: Turn, images: Sequence[str], plan: Plan) -> Contender:
    start = torchrun(turn.gpus, *([BINDING] if turn.bound else []))
    return Contender(
        name=turn.name,
        title=plan.title(turn),
        gpus=turn.gpus,
        command=[*start, "-m", "mgpu_ddp.infer", *images, f"limit={turn.rows}"],
        rows=turn.rows,
    )


def _spent(measured: Measurement) -> Spent:
    metrics = json.loads((Path(measured.said["run_dir"]) / "metrics.json").read_text())
    ranks = metrics["ranks"]

    def mean(name: str) -> float:
        return statistics.mean(rank[name] for rank in ranks)

    stages = {stage for rank in ranks for stage in rank["workers_s"]}
    first = ranks[0]
    return Spent(
        images_per_s=metrics["images_per_s"],
        loop_s=mean("wall_s") - mean("startup_s"),
        wait_s=mean("wait_s"),
        input_s=mean("input_s"),
        predict_s=mean("predict_s"),
        peers_s=mean("peers_s"),
        workers_s={s: statistics.mean(rank["workers_s"].get(s, 0.0) for rank in ranks) for s in sorted(stages)},
        gather_s=first["gather_s"],
        write_s=first["write_s"],
        collecting=(first["gather_s"] + first["write_s"]) / (first["wall_s"] - first["startup_s"]),
        bottleneck=metrics["bottleneck"],
        ranks=ranks,
    )


def _rows(kind: Kind, plan: Plan, found: dict[Turn, Found]) -> Iterator[Row]:
    """Rates beside those of one GPU, what rank 0 spends on all ranks' rows, and what binding brings."""
    for name in plan.scalings:
        turns = plan.turns(kind, name)
        for turn in turns:
            bar = SPEEDUPS.get(turn.gpus) if plan.judged and kind.name in JUDGED else None
            yield _beside(plan.title(turn, name), found[turn], found[turns[0]], turn.gpus, bar)
        if found[turns[-1]].measured:
            share = statistics.median(_spent(m).collecting for m in found[turns[-1]].measured)
            row = Row(name=f"  rank 0 of {turns[-1].gpus}, gathering and writing", value=f"{share:.2%} of its loop")
            judged = plan.judged and turns[-1].gpus == COLLECTING_AT
            yield replace(row, bar=f"< {COLLECTING:.0%}", met=share < COLLECTING) if judged else row
    for turn, bound in plan.pairs(kind):
        yield _beside(f"  bound, of {plan.title(turn, plan.scalings[0])}", found[bound], found[turn])


def _beside(name: str, result: Found, base: Found, times: int = 0, bar: float | None = None) -> Row:
    """A rate as a multiple of another, of which `times` would be ideal where that is given."""
    if not (result.rates() and base.rates()):
        return Row(name=name, value=result.problem or base.problem or "not yet measured")
    row = compare(name, result.rates(), base.rates(), bar=bar, wall_s=[m.wall_s for m in result.measured])
    efficiency = f", {_speedup(result, base) / times:.1%} of ideal" if times else ""
    return replace(row, value=f"{statistics.median(result.rates()):,.1f} images/s{efficiency}")


def _speedup(result: Found, base: Found) -> float:
    return statistics.median(result.rates()) / statistics.median(base.rates())


def _limits(kind: Kind, plan: Plan, found: dict[Turn, Found]) -> Iterator[tuple[str, ...]]:
    """Where the time of each job's median run went, and what it says limits it."""
    turns = [turn for scaling in plan.scalings for turn in plan.turns(kind, scaling)]
    for turn in [*dict.fromkeys(turns), *(bound for _, bound in plan.pairs(kind))]:
        if not found[turn].measured:
            continue
        runs = sorted(map(_spent, found[turn].measured), key=lambda run: run.images_per_s)
        run = runs[(len(runs) - 1) // 2]
        seconds = (run.loop_s, run.wait_s, run.input_s, run.predict_s, run.peers_s, sum(run.workers_s.values()))
        of_rank_0 = (f"{run.gather_s:.2f}", f"{run.write_s:.2f}", f"{run.collecting:.2%}")
        yield (plan.title(turn), *(f"{s:.2f}" for s in seconds), *of_rank_0, run.bottleneck)


def _plot(plan: Plan, found: dict[Turn, Found], path: Path) -> None:
    """Draw speed-up and efficiency against the number of GPUs, beside the ideal."""
    if (pyplot := pyplot_or_none()) is None:
        return
    figure, (speedups, efficiencies) = pyplot.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    ideal = {"color": "#8d99ae", "linewidth": 1, "zorder": 1}
    speedups.plot(plan.counts, plan.counts, label="ideal", **ideal)
    efficiencies.axhline(100, **ideal)
    for kind in plan.kinds:
        for scaling in plan.scalings:
            turns = plan.turns(kind, scaling)
            reached = [turn for turn in turns if found[turn].rates() and found[turns[0]].rates()]
            counts = [turn.gpus for turn in reached]
            times = [_speedup(found[turn], found[turns[0]]) for turn in reached]
            style = {"color": COLOURS[kind.name], "linestyle": "-" if scaling == "weak" else "--", "marker": "o"}
            speedups.plot(counts, times, label=f"{KINDS[kind.name]}, {scaling}", **style)
            efficiencies.plot(counts, [100 * t / n for t, n in zip(times, counts, strict=True)], **style)
    for axes, title in ((speedups, "times one"), (efficiencies, "% of ideal")):
        axes.set_xticks(plan.counts)
        axes.set_xlabel("GPUs" if plan.hardware.gpus else "ranks of one core")
        axes.set_title(title, fontsize=10, loc="left")
        axes.grid(alpha=0.3)
    speedups.set_yticks(plan.counts)
    speedups.legend(frameon=False)
    efficiencies.set_ylim(0, max(110, efficiencies.get_ylim()[1]))
    figure.suptitle(f"{describe(plan.hardware)}; cores of each rank: {plan.cores}; steady images/s", fontsize=10)
    save(figure, path)
