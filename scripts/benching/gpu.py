"""JPEGs and FakeData beside the usual ways to do the same, and beside what each stage reaches alone.

The peers do less than mgpu_ddp: they keep the best class alone and write one file at the end, and what they do before
they are warm does not count. All decode the same files, each image anew every time.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benching.arrays import make_array
from benching.children import PEERS, ChildFailedError, say, torchrun
from benching.contenders import Contender, Found, goes_on, measure, since
from benching.hardware import Hardware, cores_each, describe, look
from benching.jpegs import make_folder, work_folder
from benching.plot import plot
from benching.table import Row, compare, print_machine, print_table, write_report

JPEG_RATE, OF_DECODE, OF_BEST_PEER, OF_GENERATOR, OF_ONE_GPU = 25_000, 0.9, 10, 0.85, 1.9
ARRAY_RATE, OF_FORWARD = 60_000, 0.9
"""The project's bars, for an H200 with 16 cores."""
WARM_UP_IMAGES = 4096
TUTORIAL_IMAGES = 100_000
"""More than it gets to in its time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How much of everything."""

    images: int
    distinct: int
    fake_images: int
    batch_size: int
    array_batch_size: int
    workers: int
    """Per GPU."""
    seconds: float
    warm_up_s: float
    ceiling_s: float


PEER_SCRIPTS = {
    "data-parallel": ("DataParallel, loader with workers", "data_parallel.py", False, ()),
    "ddp": ("DDP, DistributedSampler, all_gather_object", "ddp.py", True, ()),
    "accelerate": ("Accelerate, gather_for_metrics", "accelerated.py", True, ("accelerate",)),
    "lightning": ("Lightning, Trainer.predict", "lightning_predict.py", True, ("lightning", "pytorch_lightning")),
    "ray": ("Ray Data, map_batches", "ray_data.py", False, ("ray",)),
    "daft": ("Daft, class UDF", "daft_frame.py", False, ("daft",)),
}
"""Name → title, script, whether torchrun starts it, and the packages of which it needs one."""
NAMES = ("ceilings", "ours", "ours-array", "ours-fake", "tutorial", *PEER_SCRIPTS)


def gpu(args: argparse.Namespace) -> bool:
    """JPEGs and FakeData on GPUs (or, to try it, a CPU) beside peers and ceilings."""
    started = time.perf_counter()
    hardware = look()
    if hardware.gpus and args.gpus > len(hardware.gpus):
        raise ChildFailedError(f"--gpus must be at most {len(hardware.gpus)}, the GPUs of this machine.")
    sizes = _sizes(args, hardware)
    rounds = args.rounds or (1 if args.quick else 3)
    work = work_folder(args.work)
    folder, mean_bytes = make_folder(work, images=sizes.images, distinct=sizes.distinct)
    say(f"{sizes.images:,} JPEGs of {mean_bytes / 1e3:.1f} kB, {sizes.distinct:,} different, {since(started)}")

    array = work / f"array-{sizes.images}.npy"
    if not args.only or "ours-array" in args.only:
        make_array(array, sizes.images)
    unit = "GPU" if hardware.gpus else "process"
    contenders = _contenders(folder, array, sizes, args.gpus, unit, only=args.only)
    found = {contender.name: Found() for contender in contenders}
    for contender in contenders:
        needs = PEER_SCRIPTS[contender.name][3] if contender.name in PEER_SCRIPTS else ()
        if needs and not any(map(importlib.util.find_spec, needs)):
            found[contender.name].problem = "not installed"

    settings = {**asdict(sizes), "mean_bytes": mean_bytes, "rounds": rounds, "gpus": args.gpus, "quick": args.quick}
    details: dict[str, Any] = {"hardware": asdict(hardware)}

    def report() -> list[Row]:
        rows = _rows(contenders, found, sizes, args.gpus, judged=bool(hardware.gpus) and not args.quick)
        details["contenders"] = {name: asdict(result) for name, result in found.items()}
        write_report(args.out, settings, rows, details)
        return rows

    if "ours" in found:
        # Fills the caches of files and of compiled kernels; what comes later must not profit from who came before.
        warm_up = [*_ours(1), *_folder_job(folder, sizes), f"limit={min(sizes.images, WARM_UP_IMAGES)}"]
        measure(
            Contender(name="warm-up", title="warm-up", gpus=1, command=warm_up), Found(), hardware, args.out / "warm-up"
        )
    for number in range(1, rounds + 1):
        round_started = time.perf_counter()
        for contender in contenders:
            # A peer's one measurement lasts longer than all of ours.
            if found[contender.name].problem or (contender.peer and number > 1):
                continue
            say(f"round {number} of {rounds}, {since(started)}: {contender.title}")
            measure(contender, found[contender.name], hardware, args.out / f"round-{number}" / contender.name)
            report()
        if number == 1:
            peers_s = sum(m.wall_s for c in contenders if c.peer for m in found[c.name].measured)
        round_s = time.perf_counter() - round_started - (peers_s if number == 1 else 0)
        if not goes_on(number, rounds, started, round_s, args.minutes):
            break

    rows = report()
    print_table(rows)
    print(f"\n{sizes.images:,} JPEGs of {mean_bytes / 1e3:.1f} kB, {sizes.distinct:,} different; {since(started)}")
    print(describe(hardware))
    print_machine(args.out)
    plot(rows, args.out / "bench.png", f"{', '.join(hardware.gpus) or 'CPU'}; images/s")
    return all(result.problem in ("", "not installed") for result in found.values())


def _sizes(args: argparse.Namespace, hardware: Hardware) -> Sizes:
    workers = cores_each(max(1, len(hardware.gpus) or args.gpus))
    if args.quick:
        images = args.images or (20_000 if hardware.gpus else 600)
        return Sizes(
            images=images,
            distinct=min(images, args.distinct or (2000 if hardware.gpus else 100)),
            fake_images=20_000 if hardware.gpus else 200,
            batch_size=256 if hardware.gpus else 16,
            array_batch_size=512 if hardware.gpus else 16,
            workers=workers,
            seconds=args.seconds or 3,
            warm_up_s=1,
            ceiling_s=1,
        )
    images = args.images or (200_000 if hardware.gpus else 5000)
    return Sizes(
        images=images,
        distinct=min(images, args.distinct or 16_000),
        fake_images=100_000 if hardware.gpus else 2000,
        batch_size=256 if hardware.gpus else 32,
        array_batch_size=512 if hardware.gpus else 32,
        workers=workers,
        seconds=args.seconds or 20,
        warm_up_s=5,
        ceiling_s=3,
    )


def _ours(gpus: int) -> list[str]:
    return [*([sys.executable] if gpus == 1 else torchrun(gpus)), "-m", "mgpu_ddp.infer"]


def _folder_job(folder: Path, sizes: Sizes) -> list[str]:
    return ["data=folder", f"data.root={folder}", f"batch_size={sizes.batch_size}"]


def _contenders(
    folder: Path, array: Path, sizes: Sizes, gpus: int, unit: str, *, only: Sequence[str] | None
) -> list[Contender]:
    """Everything that is measured, in the order of its turns."""
    job = _folder_job(folder, sizes)
    ceilings = [str(PEERS / "ceilings.py"), str(folder), f"--batch-size={sizes.batch_size}"]
    options = [str(folder), f"--batch-size={sizes.batch_size}", f"--workers={sizes.workers}", f"--gpus={gpus}"]
    options += [f"--seconds={sizes.seconds:g}", f"--warm-up={sizes.warm_up_s:g}"]
    tutorial = [str(PEERS / "tutorial.py"), str(TUTORIAL_IMAGES), "0", f"{sizes.seconds:g}"]
    contenders = [
        Contender(
            name="ceilings",
            title="ceilings of the stages",
            gpus=1,
            command=[sys.executable, *ceilings, f"--seconds={sizes.ceiling_s:g}"],
        ),
        Contender(
            name="ours", title=f"mgpu_ddp, JPEGs, 1 {unit}", gpus=1, command=[*_ours(1), *job], rows=sizes.images
        ),
    ]
    if gpus > 1:
        title = f"mgpu_ddp, JPEGs, {gpus} × {unit}"
        contenders.append(
            Contender(name="ours-all", title=title, gpus=gpus, command=[*_ours(gpus), *job], rows=sizes.images)
        )
    fake = [*_ours(1), f"data.size={sizes.fake_images}", f"batch_size={sizes.batch_size}"]
    decoded = [*_ours(1), "data=array", f"data.path={array}", f"batch_size={sizes.array_batch_size}"]
    contenders += [
        Contender(
            name="ours-array",
            title=f"mgpu_ddp, images decoded before, 1 {unit}",
            gpus=1,
            command=decoded,
            rows=sizes.images,
        ),
        Contender(
            name="ours-fake", title=f"mgpu_ddp, FakeData, 1 {unit}", gpus=1, command=fake, rows=sizes.fake_images
        ),
        Contender(
            name="tutorial",
            title="the tutorial's script, FakeData",
            gpus=gpus,
            command=[sys.executable, *tutorial],
            peer=True,
        ),
    ]
    for name, (title, script, distributed, _needs) in PEER_SCRIPTS.items():
        start = torchrun(gpus) if distributed else [sys.executable]
        command = [*start, str(PEERS / script), *options]
        contenders.append(Contender(name=name, title=title, gpus=gpus, command=command, peer=True))
    wanted = set(only or NAMES) | ({"ours-all"} if not only or "ours" in only else set())
    return [contender for contender in contenders if contender.name in wanted]


def _rows(
    contenders: Sequence[Contender], found: dict[str, Found], sizes: Sizes, gpus: int, *, judged: bool
) -> list[Row]:
    """The table; `judged` says whether the bars apply."""
    ceilings, ours, fake = (found.get(name, Found()) for name in ("ceilings", "ours", "ours-fake"))
    everything = found.get("ours-all", Found()) if gpus > 1 else ours
    titles = {contender.name: contender.title for contender in contenders}

    def bar(value: float) -> float | None:
        return value if judged else None

    rows: list[Row] = []
    if ours.rates():
        rate = statistics.median(ours.rates())
        row = _plain(titles["ours"], ours)
        rows.append(replace(row, bar=f">= {JPEG_RATE}/s", met=rate >= JPEG_RATE) if judged else row)
        whole = [sizes.images / m.wall_s for m in ours.measured]
        rows.append(Row(name="  start-up and proof included", value=f"{statistics.median(whole):,.1f} images/s"))
        for stage in ("decode", "read"):
            if ceilings.rates(stage):
                limit = bar(OF_DECODE) if stage == "decode" else None
                rows.append(_versus(f"  of {stage} alone", ours.rates(), ceilings.rates(stage), limit))
    if gpus > 1 and everything.rates():
        rows.append(_plain(titles["ours-all"], everything))
        if ours.rates():
            limit = bar(OF_ONE_GPU) if gpus == 2 else None
            rows.append(_versus("  times one GPU", everything.rates(), ours.rates(), limit))
    peers = {name: found[name] for name in PEER_SCRIPTS if name in found and found[name].rates()}
    if everything.rates() and peers:
        best = max(peers, key=lambda name: statistics.median(peers[name].rates()))
        rows.append(
            _versus(f"  times the best peer ({best})", everything.rates(), peers[best].rates(), bar(OF_BEST_PEER))
        )
    for name in PEER_SCRIPTS:
        if name in found:
            rows.append(_peer(titles[name], found[name], everything))
    decoded = found.get("ours-array", Found())
    if decoded.rates():
        rate = statistics.median(decoded.rates())
        row = _plain(titles["ours-array"], decoded)
        rows.append(replace(row, bar=f">= {ARRAY_RATE}/s", met=rate >= ARRAY_RATE) if judged else row)
        if ceilings.rates("forward"):
            # What each reached with its own batch size.
            rows.append(_versus("  of forward alone", decoded.rates(), ceilings.rates("forward"), bar(OF_FORWARD)))
    if fake.rates():
        rows.append(_plain(titles["ours-fake"], fake))
        if ceilings.rates("generate"):
            rows.append(
                _versus("  of the generator alone", fake.rates(), ceilings.rates("generate"), bar(OF_GENERATOR))
            )
    if "tutorial" in found:
        rows.append(_peer(titles["tutorial"], found["tutorial"], fake))
    rows += [Row(name=titles[c.name], value=found[c.name].problem) for c in contenders if _lost(c, found[c.name])]
    return rows


def _lost(contender: Contender, result: Found) -> bool:
    return bool(result.problem) and not contender.peer


def _plain(name: str, result: Found) -> Row:
    return Row(
        name=name,
        wall_s=[m.wall_s for m in result.measured],
        value=f"{statistics.median(result.rates()):,.1f} images/s",
    )


def _versus(name: str, ours: Sequence[float], theirs: Sequence[float], limit: float | None) -> Row:
    """Our rate as a multiple of theirs, which is the figure shown."""
    row = compare(name, ours, theirs, bar=limit)
    return replace(row, value=f"{statistics.median(theirs):,.1f} images/s")


def _peer(name: str, result: Found, ours: Found) -> Row:
    """A peer's rate, and ours as a multiple of it."""
    if not result.rates():
        return Row(name=name, value=result.problem or "not yet measured")
    row = _plain(name, result)
    if not ours.rates():
        return row
    return replace(row, ratio=statistics.median(ours.rates()) / statistics.median(result.rates()))
