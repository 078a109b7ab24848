"""The same jobs on 1, 2, 4 and 8 GPUs with as many cores for each: what more GPUs bring, and what limits them.

Weak scaling gives each GPU the same rows, strong scaling shares out the rows of the largest weak job, so that the two
meet at the most GPUs. Rates are the jobs' own, after their first batches. A machine without GPUs has ranks of one core.
"""

import argparse
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common.processes import torchrun

from benching.arrays import make_array
from benching.children import ChildFailedError, Measurement
from benching.contenders import Contender, Found, Rounds, take_turns
from benching.hardware import Hardware, cores_each, describe, look
from benching.jpegs import make_folder, work_folder
from benching.table import Row, compare, print_machine, print_table, rate, write_report

SPEEDUPS, JUDGED = {2: 1.9, 4: 3.7, 8: 7.2}, ("jpegs", "array")
"""The project's bars: times one GPU by number of GPUs, and for which images."""
COLLECTING, COLLECTING_AT = 0.03, 8
"""The share of rank 0's time that may go to gathering and writing, and at how many GPUs."""
COUNTS = (1, 2, 4, 8)
SCALINGS = ("weak", "strong")
ROWS = {"jpegs": 400_000, "array": 200_000, "fake": 40_000}
"""For each GPU: ten seconds of JPEGs, lest what differs between the starts of the ranks count."""
KINDS = {"jpegs": "JPEGs", "array": "decoded images", "fake": "FakeData"}
COLOURS = {"jpegs": "#2a6f97", "array": "#e07a5f", "fake": "#81b29a"}
DISTINCT = 16_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """Where images come from, and how many."""

    name: str
    rows_each: int
    """For each GPU where the scaling is weak."""
    batch_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """A job on so many GPUs."""

    kind: Kind
    gpus: int
    rows: int

    @property
    def name(self) -> str:
        return f"{self.kind.name}-{self.rows}-on-{self.gpus}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The measurements, and the hardware for them."""

    hardware: Hardware
    counts: list[int]
    """Numbers of GPUs, ascending from 1."""
    shares: int
    """Into how many the cores are split: one for each GPU of this machine, or for each core where it has none."""
    cores: int
    """For each rank."""
    scalings: list[str]
    kinds: list[Kind]
    judged: bool
    """The bars apply."""

    def turns(self, kind: Kind, scaling: str) -> list[Turn]:
        """One for each number of GPUs."""
        each = [count if scaling == "weak" else self.counts[-1] for count in self.counts]
        return [
            Turn(kind=kind, gpus=gpus, rows=shares * kind.rows_each)
            for gpus, shares in zip(self.counts, each, strict=True)
        ]

    def once(self) -> list[Turn]:
        """Every job once, in the order of a round."""
        turns: list[Turn] = []
        for kind in self.kinds:
            turns += (turn for scaling in self.scalings for turn in self.turns(kind, scaling))
        return list(dict.fromkeys(turns))

    def title(self, turn: Turn, scaling: str = "") -> str:
        """A turn's name, as part of a scaling or by its rows."""
        ranks = f"{turn.gpus} {'GPU' if self.hardware.gpus else 'rank'}{'s' if turn.gpus > 1 else ''}"
        what = scaling or f"{turn.rows:,} rows"
        return f"{KINDS[turn.kind.name]}, {what}, {ranks}"


def scaling(args: argparse.Namespace) -> bool:
    """Compare 1, 2, 4 and 8 GPUs or, to try it, cores: JPEGs, decoded images and FakeData, weak and strong."""
    plan = _plan(args, look())
    work = work_folder(args.work)
    images = {kind: _images(kind, plan, work, quick=args.quick) for kind in plan.kinds}
    turns = plan.once()
    contenders = [_contender(turn, images[turn.kind], plan) for turn in turns]
    found = {contender.name: Found() for contender in contenders}
    rounds = Rounds(
        number=args.rounds or (1 if args.quick else 3),
        hardware=plan.hardware,
        out=args.out,
        minutes=args.minutes,
        cpu_shares=plan.shares,
    )

    def report() -> list[Row]:
        rows = [row for kind in plan.kinds for row in _rows(kind, plan, found)]
        metrics = {name: [_metrics(m) for m in result.measured] for name, result in found.items()}
        settings = {**asdict(plan), "rounds": rounds.number, "quick": args.quick}
        results = {name: asdict(result) for name, result in found.items()}
        details = {"hardware": settings.pop("hardware"), "contenders": results, "metrics": metrics}
        write_report(args.out, settings, rows, details)
        return rows

    largest = {plan.turns(kind, "weak")[-1].name for kind in plan.kinds if plan.hardware.gpus}
    take_turns(contenders, found, rounds, report, warm_up=[c for c in contenders if c.name in largest])
    print_table(report())
    print(f"\n{describe(plan.hardware)}; cores of each rank: {plan.cores}")
    print_machine(args.out)
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
    return Plan(
        hardware=hardware,
        counts=counts,
        shares=shares,
        cores=cores_each(shares),
        scalings=args.scalings or list(SCALINGS),
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
    common = [f"batch_size={kind.batch_size}", "model.weights=null"]
    if kind.name == "fake":
        return [f"data.size={largest}", *common]
    if kind.name == "jpegs":
        root, _ = make_folder(work, images=largest, distinct=2000 if quick else DISTINCT)
        return ["data=folder", f"data.root={root}", *common]
    array = work / f"array-{largest}.npy"
    make_array(array, largest)
    return ["data=array", f"data.path={array}", *common]


def _contender(turn: Turn, images: Sequence[str], plan: Plan) -> Contender:
    start = torchrun("--standalone", f"--nproc_per_node={turn.gpus}")
    return Contender(
        name=turn.name,
        title=plan.title(turn),
        gpus=turn.gpus,
        command=[*start, "-m", "mgpu_ddp.infer", *images, f"limit={turn.rows}"],
        rows=turn.rows,
    )


def _metrics(measured: Measurement) -> dict[str, Any]:
    return dict(json.loads((Path(measured.said["run_dir"]) / "metrics.json").read_text()))


def _collecting(measured: Measurement) -> float:
    """Work out the share of rank 0's loop in which its collecting thread gathered or wrote."""
    first = _metrics(measured)["ranks"][0]
    return float((first["gather_s"] + first["write_s"]) / (first["wall_s"] - first["startup_s"]))


def _rows(kind: Kind, plan: Plan, found: dict[str, Found]) -> Iterator[Row]:
    """Make the rows of rates against those of one GPU, and of what rank 0 spends on all ranks' rows."""
    for name in plan.scalings:
        turns = plan.turns(kind, name)
        for turn in turns:
            bar = SPEEDUPS.get(turn.gpus) if plan.judged and kind.name in JUDGED else None
            yield _beside(plan.title(turn, name), found[turn.name], found[turns[0].name], turn.gpus, bar)
        if found[turns[-1].name].measured:
            share = statistics.median(_collecting(m) for m in found[turns[-1].name].measured)
            row = Row(name=f"  rank 0 of {turns[-1].gpus}, gathering and writing", value=f"{share:.2%} of its loop")
            judged = plan.judged and turns[-1].gpus == COLLECTING_AT
            yield replace(row, bar=f"< {COLLECTING:.0%}", met=share < COLLECTING) if judged else row


def _beside(name: str, result: Found, base: Found, times: int, bar: float | None) -> Row:
    """Make the row of a rate as a multiple of another, of which `times` would be ideal."""
    if not (result.rates() and base.rates()):
        return Row(name=name, value=result.problem or base.problem or "not yet measured")
    row = compare(name, result.rates(), base.rates(), bar=bar, wall_s=result.wall_s)
    limit = result.measured[-1].said["bottleneck"]
    return replace(row, value=f"{rate(result.rates())}, {row.ratio / times:.1%} of ideal, limit: {limit}")
