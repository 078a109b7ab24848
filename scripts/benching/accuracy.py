"""The effect of precision and decoder: each setting's predictions against those of fp32 and Pillow, image by image.

The checkpoint is trained on the spot: random weights would say nothing, since all their classes are near ties. Its
classes overlap a little and their labels are smoothed, so that it is confident but never certain.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common.showing import print_columns, say

from benching.children import PEERS, ChildFailedError, run_child
from benching.contenders import Contender, Found, Rounds, measure
from benching.hardware import describe, look, share
from benching.jpegs import work_folder
from benching.patterns import Levels, make_patterns
from benching.table import Row, print_machine, write_report

SAME_TOP1 = 0.995
"""The project's bar, for the default on a GPU."""
REFERENCE, DEFAULT = "fp32, decode=cpu", "fp16, decode=gpu: the default"
SETTINGS = {
    REFERENCE: ["runtime.precision=fp32", "runtime.decode=cpu"],
    DEFAULT: [],
    "fp16, decode=exact": ["runtime.precision=fp16", "runtime.decode=exact"],
    "bf16, decode=gpu": ["runtime.precision=bf16", "runtime.decode=gpu"],
    "fp32, decode=gpu": ["runtime.precision=fp32", "runtime.decode=gpu"],
    "bf16, decode=cpu": ["runtime.precision=bf16", "runtime.decode=cpu"],
}
ON_GPU = tuple(name for name in SETTINGS if name != "bf16, decode=cpu")
ON_CPU = (REFERENCE, "bf16, decode=cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How much of everything."""

    levels: Levels
    training: int
    """Images to train on."""
    epochs: int
    training_batch_size: int
    side: int
    """Pixels of a crop to train on; predictions are of 224."""
    held_out: int
    """Images to predict, none of which was trained on."""
    batch_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """How one table of predictions differs from the reference's."""

    images: int
    same_top1: float
    """A share, as are `accuracy` and `reference_accuracy`."""
    mean: float
    """Like `p99` and `max` of the absolute difference, in the probability of the reference's top-1 class."""
    p99: float
    max: float
    accuracy: float
    reference_accuracy: float
    changed: int
    """Images whose top-1 differs."""
    margin: float
    """Between the two best probabilities of the reference, the widest of those images; 0 without any."""


def accuracy(args: argparse.Namespace) -> bool:
    """Compare each precision and decoder with fp32 and Pillow on the same JPEGs."""
    hardware = look()
    rounds = Rounds(number=1, hardware=hardware, out=args.out)
    judged = bool(hardware.gpus) and not args.quick
    sizes = _sizes(args.images, gpu=bool(hardware.gpus), full=judged)
    work = work_folder(args.work)
    training = make_patterns(work, sizes.levels, images=sizes.training, seed=0)
    held_out = make_patterns(work, sizes.levels, images=sizes.held_out, seed=1)
    checkpoint = args.out / "confident.pt"
    train = [sys.executable, str(PEERS / "confident.py"), str(training), str(checkpoint), f"--epochs={sizes.epochs}"]
    say(f"training on {sizes.training:,} JPEGs of {sizes.levels.classes} classes")
    with share(hardware, 1):
        options = [f"--batch-size={sizes.training_batch_size}", f"--side={sizes.side}"]
        trained = run_child([*train, *options], args.out / "training")

    job = [sys.executable, "-m", "mgpu_ddp.infer", "data=folder", f"data.root={held_out}"]
    job += [f"model.weights={checkpoint}", f"model.num_classes={sizes.levels.classes}"]
    job += ["output.fields=[topk,probs]", f"batch_size={sizes.batch_size}"]
    found = {name: Found() for name in (ON_GPU if hardware.gpus else ON_CPU)}
    runs = {name: args.out / f"predicted-{number}" / "run" for number, name in enumerate(found)}
    differences: dict[str, Difference] = {}
    details: dict[str, Any] = {"hardware": asdict(hardware), "training": asdict(trained)}

    def report() -> list[Row]:
        others = [name for name in found if name != REFERENCE and (found[name].measured or found[name].problem)]
        rows = [row_of(name, differences.get(name), judged=judged) for name in others]
        details["differences"] = {name: asdict(difference) for name, difference in differences.items()}
        details["runs"] = {name: asdict(result) for name, result in found.items()}
        write_report(args.out, asdict(sizes), rows, details)
        return rows

    for name, result in found.items():
        say(name)
        command = [*job, *SETTINGS[name], f"output.dir={runs[name]}"]
        contender = Contender(name=name, title=name, command=command, rows=sizes.held_out)
        measure(contender, result, rounds, runs[name].parent)
        if name == REFERENCE and result.problem:
            raise ChildFailedError(f"{REFERENCE} failed, with which the others are compared.")
        if name == REFERENCE:
            details["confidence"] = confidence = _confidence(runs[REFERENCE])
        elif not result.problem:
            differences[name] = compare_tables(runs[REFERENCE], runs[name])
            say(f"{differences[name].same_top1:.3%} the same top-1")
        report()

    rows = report()
    _print(rows, differences)
    said = ", ".join(f"{name} {value:.3f}" for name, value in confidence.items())
    print(f"\n{sizes.held_out:,} JPEGs of {sizes.levels.classes} classes; with {REFERENCE}: {said}")
    print(f"{sizes.training:,} others trained on, {sizes.epochs} epochs, {trained.wall_s:.0f} s; {describe(hardware)}")
    print_machine(args.out)
    return not any(result.problem for result in found.values()) and all(row.met is not False for row in rows)


def _sizes(images: int | None, *, gpu: bool, full: bool) -> Sizes:
    """`full` is for a GPU; the rest only tries the script."""
    if full:
        levels = Levels(directions=5, wavelengths=2, colours=5, kinds=2)
        training, held_out = 20_000, images or 20_000
    else:
        levels = Levels(directions=2, wavelengths=2, colours=2, kinds=1)
        training, held_out = 1000, images or 400
    return Sizes(
        levels=levels,
        training=training,
        epochs=10 if full else 4,
        training_batch_size=256 if full else 32,
        side=224 if gpu else 112,
        held_out=-(-held_out // levels.classes) * levels.classes,
        batch_size=256 if gpu else 32,
    )


def compare_tables(reference: Path, other: Path) -> Difference:
    """Compare the predictions of two run folders row by row.

    Raises:
        ChildFailedError: they are not of the same images, or one has errors.
    """
    import numpy as np

    ours, theirs = _read(other), _read(reference)
    for column in ("index", "path", "label"):
        if not np.array_equal(ours[column], theirs[column]):
            raise ChildFailedError(f"{other} and {reference} differ in {column}: they are not of the same images.")
    rows = np.arange(len(theirs["pred"]))
    apart = np.abs(ours["probs"] - theirs["probs"])[rows, theirs["pred"]]
    changed = ours["pred"] != theirs["pred"]
    second, best = np.sort(theirs["probs"], axis=1)[:, -2:].T
    return Difference(
        images=len(rows),
        same_top1=float(1 - changed.mean()),
        mean=float(apart.mean()),
        p99=float(np.percentile(apart, 99)),
        max=float(apart.max()),
        accuracy=float((ours["pred"] == ours["label"]).mean()),
        reference_accuracy=float((theirs["pred"] == theirs["label"]).mean()),
        changed=int(changed.sum()),
        margin=float((best - second)[changed].max(initial=0)),
    )


def _confidence(run: Path) -> dict[str, float]:
    """How often a model is right, and how sure it is: a reader sees that it neither guesses nor is certain."""
    import numpy as np

    table = _read(run)
    best = table["probs"].max(axis=1)
    return {
        "accuracy": float((table["pred"] == table["label"]).mean()),
        "mean_prob": float(best.mean()),
        "median_prob": float(np.median(best)),
        "max_prob": float(best.max()),
    }


def _read(run: Path) -> dict[str, Any]:
    """The columns of a table as arrays, in the order of the index; `probs` is float64 (n, classes)."""
    import numpy as np
    import pyarrow.parquet as pq

    table = pq.read_table(run / "predictions").sort_by("index")
    if errors := len(table) - table["error"].null_count:
        raise ChildFailedError(f"{run} has {errors} error rows.")
    columns = {name: table[name].to_numpy() for name in ("index", "path", "label", "pred")}
    probs = table["probs"].combine_chunks().flatten().to_numpy().astype(np.float64)
    return {**columns, "probs": probs.reshape(len(table), -1)}


def row_of(name: str, difference: Difference | None, *, judged: bool) -> Row:
    """The row of the report; `judged` says whether the bar applies."""
    if difference is None:
        return Row(name=name, value="FAILED")
    row = Row(name=name, value=f"{difference.same_top1:.3%}")
    if not judged or name != DEFAULT:
        return row
    return replace(row, bar=f">= {SAME_TOP1:.1%}", met=difference.same_top1 >= SAME_TOP1)


def _print(rows: Sequence[Row], differences: dict[str, Difference]) -> None:
    lines = [("", "same top-1", "changed", "their margin", "accuracy", "difference: mean", "p99", "max", "bar", "")]
    for row in rows:
        figures = [""] * 6
        if found := differences.get(row.name):
            margin = f"<= {found.margin:.1e}" if found.changed else ""
            figures = [f"{found.changed:,}", margin, f"{found.accuracy:.2%}"]
            figures += [f"{value:.1e}" for value in (found.mean, found.p99, found.max)]
        verdict = "" if row.met is None else "met" if row.met else "MISSED"
        lines.append((row.name, row.value, *figures, row.bar, verdict))
    print_columns(lines)
