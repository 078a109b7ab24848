"""Models that a script brings: ResNet18 beside the same one by name, a detector and a segmenter beside a plain loop."""

import argparse
import sys
from dataclasses import asdict, replace

from common.processes import torchrun
from common.showing import say

from benching.children import PEERS
from benching.contenders import Contender, Found, Rounds, take_turns
from benching.hardware import cores_each, describe, look
from benching.jpegs import make_folder, work_folder
from benching.table import Row, compare, print_machine, print_table, rate, write_report

OF_NAMED, OF_PLAIN_LOOP = 0.97, 1.5
"""The project's bars, for an H200 with 16 cores."""
SIDES = {"detector": 480, "segmenter": 480}
"""Sides of the images that these models are given, in pixels."""


def own(args: argparse.Namespace) -> bool:
    """Compare models of a script with named ones and with plain loops, on a GPU or, to try it, on a CPU."""
    hardware = look()
    on_gpu = bool(hardware.gpus)
    rounds = Rounds(number=args.rounds or (1 if args.quick else 3), hardware=hardware, out=args.out)
    images = args.images or (200_000 if on_gpu and not args.quick else 200)
    few, batch_size, small = (4000, 256, 32) if on_gpu else (16, 16, 4)
    few = 400 if on_gpu and args.quick else few
    work = work_folder(args.work)
    folder, _ = make_folder(work, images=images, distinct=min(images, 16_000))
    few_folder, mean_bytes = make_folder(work, images=few, distinct=few)
    jpegs = f"JPEGs of {mean_bytes / 1e3:.1f} kB: {images:,} for ResNet18, {few:,} for the others"
    say(jpegs)
    script = str(PEERS / "brought.py")
    classify = ["data=folder", f"data.root={folder}", f"batch_size={batch_size}"]
    env = ["env", "MODEL=resnet18"]
    contenders = [
        Contender(
            name="named",
            title="ResNet18 by name",
            command=[sys.executable, "-m", "mgpu_ddp.infer", *classify, "model.weights=null"],
            rows=images,
        ),
        Contender(
            name="brought",
            title="ResNet18 of a script",
            command=[*env, sys.executable, script, *classify],
            rows=images,
        ),
    ]
    plain = [str(few_folder), f"--batch-size={small}", f"--workers={cores_each(1)}"]
    plain += ["--seconds=20", "--warm-up=5"] if on_gpu else ["--seconds=2", "--warm-up=1"]
    for name, side in SIDES.items():
        side = side if on_gpu else 64
        start = ["env", f"MODEL={name}", f"SIDE={side}"]
        job = ["data=folder", f"data.root={few_folder}", "transform=plain", f"transform.size={side}"]
        loop = [*torchrun("--standalone", "--nproc_per_node=1"), str(PEERS / "brought_ddp.py"), *plain]
        contenders += [
            Contender(
                name=name,
                title=f"{name} of a script",
                command=[*start, sys.executable, script, *job, f"batch_size={small}"],
                rows=few,
            ),
            Contender(name=f"{name} loop", title=f"{name}, plain loop", command=[*start, *loop], once=not args.rounds),
            Contender(
                name=f"{name} autocast",
                title=f"{name}, plain loop with autocast",
                command=[*start, "AUTOCAST=1", *loop],
                once=not args.rounds,
            ),
        ]
    contenders = [c for c in contenders if not args.only or c.name.partition(" ")[0] in args.only]
    found = {contender.name: Found() for contender in contenders}

    def report() -> list[Row]:
        rows = _rows(contenders, found, judged=on_gpu and not args.quick)
        details = {name: asdict(result) for name, result in found.items()}
        write_report(args.out, {"images": images, "few": few}, rows, {"hardware": asdict(hardware), "runs": details})
        return rows

    warm_up = [replace(c, command=[*c.command, "limit=512"], rows=None) for c in contenders if c.name == "named"]
    take_turns(contenders, found, rounds, report, warm_up=warm_up)
    print_table(report())
    print(f"\n{jpegs}\n{describe(hardware)}")
    print_machine(args.out)
    return all(not result.problem for result in found.values())


def _rows(contenders: list[Contender], found: dict[str, Found], *, judged: bool) -> list[Row]:
    titles = {contender.name: contender.title for contender in contenders}
    rows = []
    for name, result in found.items():
        if result.rates():
            rows.append(Row(name=titles[name], wall_s=result.wall_s, value=rate(result.rates())))
        elif result.problem:
            rows.append(Row(name=titles[name], value=result.problem))
    pairs = [("brought", "named", OF_NAMED), *((name, f"{name} loop", OF_PLAIN_LOOP) for name in SIDES)]
    pairs += [(name, f"{name} autocast", None) for name in SIDES]
    for ours, theirs, bar in pairs:
        if all(name in found and found[name].rates() for name in (ours, theirs)):
            title = f"  {titles[ours]} : {titles[theirs]}"
            rows.append(compare(title, found[ours].rates(), found[theirs].rates(), bar=bar if judged else None))
    return rows
