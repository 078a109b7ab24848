"""One machine without a GPU against the tutorial's script and bare loops, and memory over a long run."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from common.processes import torchrun

from benching.children import PEERS, ChildFailedError
from benching.contenders import Contender, Found, Rounds, measure, take_turns
from benching.hardware import Hardware
from benching.table import Row, compare, print_machine, print_table, rate, write_report

INFER = ["-m", "mgpu_ddp.infer", "runtime.device=cpu"]
WIDE = ["output.fields=[topk,logits]", "output.commit_every=1000"]
TINY = ["data.image_size=[3,32,32]", "transform.size=32", "model.name=squeezenet1_1"]
"""Next to no model, so that rows come fast."""


def cpu(args: argparse.Namespace) -> bool:
    """Compare FakeData (3, 224, 224) through ResNet18, batches of 32, on one machine without a GPU."""
    images = args.images or (480 if args.quick else 1000)
    rounds = Rounds(
        number=args.rounds or (1 if args.quick else 3),
        hardware=Hardware(gpus=[], cuda=None, cudnn=None, driver=None),
        out=args.out,
        limit_s=3600,
    )
    job = [*INFER, f"data.size={images}"]
    bare = [sys.executable, str(PEERS / "bare.py"), f"--images={images}"]
    commands = {
        "the tutorial's script": [sys.executable, str(PEERS / "tutorial.py"), str(images), "2"],
        "python -m mgpu_ddp.infer": [sys.executable, *job],
        "one process, compiled": [sys.executable, *job, "runtime.compile=on"],
        "torchrun, 2 processes": [*torchrun("--standalone", "--nproc_per_node=2"), *job],
        "bare channels_last loop": bare,
        "bare loop, folded, a batch per thread": [*bare, "--fold", "--pool"],
    }
    contenders = [
        Contender(name=str(place), title=title, command=command)
        for place, (title, command) in enumerate(commands.items())
    ]
    found = {contender.name: Found() for contender in contenders}
    take_turns(contenders, found, rounds, lambda: None, warm_up=contenders)
    failed = [c.title for c in contenders if found[c.name].problem]
    if failed:
        raise ChildFailedError(f"{', '.join(failed)} failed; see {args.out}")

    tutorial, one, compiled, two, loop, ceiling = found.values()

    def bar(value: float) -> float | None:
        return None if args.quick else value

    def whole(result: Found) -> list[float]:
        return [images / wall_s for wall_s in result.wall_s]

    titles = list(commands)
    rows = [
        Row(name=titles[0], wall_s=tutorial.wall_s, value=rate(whole(tutorial))),
        compare(titles[1], whole(one), whole(tutorial), bar=bar(1.0), wall_s=one.wall_s),
        compare(titles[3], whole(two), whole(tutorial), bar=bar(0.9), wall_s=two.wall_s),
        compare("one process, steady, of the tutorial's", one.rates(), tutorial.rates(), bar=bar(1.4)),
        compare("one process, compiled, of the same", compiled.rates(), tutorial.rates(), bar=bar(1.6)),
        Row(name=titles[4], value=rate(loop.rates())),
        compare("one process, steady, of that", one.rates(), loop.rates(), bar=bar(0.95)),
        Row(name=titles[5], value=rate(ceiling.rates())),
        compare("one process, steady, of that", one.rates(), ceiling.rates()),
        compare("2 processes, steady, of that", two.rates(), ceiling.rates()),
        _memory(rounds, 4000 if args.quick else 20_000),
    ]
    print_table(rows)
    settings = {"images": images, "rounds": rounds.number}
    details = {title: asdict(result) for title, result in zip(titles, found.values(), strict=True)}
    write_report(args.out, settings, rows, {"contenders": details})
    print_machine(args.out)
    return True


def _memory(rounds: Rounds, most: int) -> Row:
    """Compare the peak memory of rank 0 of 2, which gathers wide rows, with that over a quarter of the rows."""
    peaks = []
    for rows in (most // 4, most):
        command = [*torchrun("--standalone", "--nproc_per_node=2"), *INFER, *TINY, *WIDE, f"data.size={rows}"]
        contender, found = Contender(name="memory", title="memory", command=command, rows=rows), Found()
        measure(contender, found, rounds, rounds.out / f"memory-{rows}")
        if found.problem:
            raise ChildFailedError(found.problem)
        metrics = json.loads((Path(found.measured[0].said["run_dir"]) / "metrics.json").read_text())
        peaks.append(metrics["ranks"][0]["peak_host_bytes"])
    first, last = peaks
    return Row(
        name=f"peak memory of rank 0 of 2, {most // 4:,} rows -> {most:,}",
        value=f"{first / 2**20:.0f} -> {last / 2**20:.0f} MiB",
        ratio=last / first,
        bar="<= 1.1",
        met=last / first <= 1.1,
    )
