"""JPEGs, photos, a web mix, decoded images and FakeData against the usual ways to do the same.

And against what each stage reaches alone. The peers do less than mgpu_ddp: they keep the best class alone and write one
file at the end, and what they do before they are warm does not count. All decode the same files, each image anew every
time.
"""

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common.processes import torchrun
from common.showing import say

from benching.arrays import make_array
from benching.children import PEERS, ChildFailedError
from benching.contenders import Contender, Found, Rounds, take_turns
from benching.hardware import cores_each, describe, look
from benching.jpegs import make_folder, work_folder
from benching.piles import make_pile, photo, web
from benching.plot import CEILING, OTHER, OURS, Bar, plot_groups
from benching.table import Row, compare, print_machine, print_table, rate, write_report

JPEG_RATE, OF_DECODE, OF_BEST_PEER, OF_GENERATOR = 25_000, 0.9, 10, 0.85
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
    seconds: float
    """A peer works so long once warm."""
    warm_up_s: float
    ceiling_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """Another way to predict the JPEGs."""

    title: str
    script: str
    distributed: bool = False
    """Started by torchrun."""
    needs: tuple[str, ...] = ()
    """Packages of which it needs one."""


PEER_SCRIPTS = {
    "data-parallel": Peer(title="DataParallel, loader with workers", script="data_parallel.py"),
    "ddp": Peer(title="DDP, DistributedSampler, all_gather_object", script="ddp.py", distributed=True),
    "accelerate": Peer(
        title="Accelerate, gather_for_metrics", script="accelerated.py", distributed=True, needs=("accelerate",)
    ),
    "lightning": Peer(
        title="Lightning, Trainer.predict",
        script="lightning_predict.py",
        distributed=True,
        needs=("lightning", "pytorch_lightning"),
    ),
    "ray": Peer(title="Ray Data, map_batches", script="ray_data.py", needs=("ray",)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pile:
    """Images other than small JPEGs; plain DDP predicts them as well."""

    title: str
    make: Callable[[int], tuple[str, bytes]]
    images: int
    distinct: int
    batch_size: int
    decodes_alone: bool = False
    """All are JPEGs that the GPU decodes: the ceiling is its decoder's."""


PILES = {
    "photos": Pile(
        title="photos of 12 megapixels", make=photo, images=3000, distinct=96, batch_size=64, decodes_alone=True
    ),
    "web": Pile(title="a web mix", make=web, images=60_000, distinct=2000, batch_size=256),
}
NAMES = ("ceilings", "ours", "ours-array", "ours-fake", "tutorial", *PEER_SCRIPTS, *PILES)


def gpu(args: argparse.Namespace) -> bool:
    """Compare JPEGs, decoded images and FakeData with peers and ceilings, on GPUs or, to try it, on CPUs."""
    hardware = look()
    on_gpu = bool(hardware.gpus)
    if on_gpu and args.gpus > len(hardware.gpus):
        raise ChildFailedError(f"--gpus must be at most {len(hardware.gpus)}, the GPUs of this machine.")
    sizes = _sizes(args, on_gpu=on_gpu)
    rounds = Rounds(
        number=args.rounds or (1 if args.quick else 3), hardware=hardware, out=args.out, minutes=args.minutes
    )
    work = work_folder(args.work)
    folder, mean_bytes = make_folder(work, images=sizes.images, distinct=sizes.distinct)
    jpegs = f"{sizes.images:,} JPEGs of {mean_bytes / 1e3:.1f} kB, {sizes.distinct:,} different"
    say(jpegs)
    array = work / f"array-{sizes.images}.npy"
    wanted = set(args.only or NAMES)
    if "ours-array" in wanted:
        make_array(array, sizes.images)

    workers = cores_each(max(1, len(hardware.gpus) or args.gpus))
    contenders = [*_ours(folder, array, sizes, args.gpus), *_peers(folder, sizes, args.gpus, workers)]
    contenders = [c for c in contenders if c.name in wanted]
    for name, pile in PILES.items():
        if name in wanted:
            contenders += _pile(name, pile, work, sizes, args, workers)
    # A ceiling is that of one GPU.
    contenders = [c for c in contenders if not c.name.endswith("ceilings") or args.gpus == 1]
    found = {contender.name: Found(problem=_missing(contender.name)) for contender in contenders}
    settings = {**asdict(sizes), "mean_bytes": mean_bytes, "rounds": rounds.number, "gpus": args.gpus}

    def report() -> list[Row]:
        rows = _rows(contenders, found, sizes, judged=on_gpu and not args.quick)
        details = {name: asdict(result) for name, result in found.items()}
        write_report(args.out, settings, rows, {"hardware": asdict(hardware), "contenders": details})
        return rows

    first = [replace(c, command=[*c.command, f"limit={min(sizes.images, WARM_UP_IMAGES)}"], rows=None)
             for c in contenders if c.name == "ours"]  # fmt: skip
    take_turns(contenders, found, rounds, report, warm_up=first)
    print_table(report())
    print(f"\n{jpegs}\n{describe(hardware)}")
    print_machine(args.out)
    if groups := _groups(found):
        plot_groups(groups, args.out / "bench.png", f"{describe(hardware)}; ResNet18")
    return all(result.problem in ("", "not installed") for result in found.values())


def _sizes(args: argparse.Namespace, *, on_gpu: bool) -> Sizes:
    if args.quick:
        images, distinct, fake_images = (20_000, 2000, 20_000) if on_gpu else (200, 100, 200)
        batch_size, array_batch_size = (256, 512) if on_gpu else (16, 16)
        seconds, warm_up_s, ceiling_s = 3, 1, 1
    else:
        images, distinct, fake_images = (200_000, 16_000, 100_000) if on_gpu else (5000, 5000, 2000)
        batch_size, array_batch_size = (256, 512) if on_gpu else (32, 32)
        seconds, warm_up_s, ceiling_s = 20, 5, 3
    images = args.images or images
    return Sizes(
        images=images,
        distinct=min(images, args.distinct or distinct),
        fake_images=fake_images,
        batch_size=batch_size,
        array_batch_size=array_batch_size,
        seconds=args.seconds or seconds,
        warm_up_s=warm_up_s,
        ceiling_s=ceiling_s,
    )


def _ours(folder: Path, array: Path, sizes: Sizes, gpus: int) -> list[Contender]:
    """List the ceilings of one GPU, and our three jobs on so many."""
    start = [sys.executable] if gpus == 1 else torchrun("--standalone", f"--nproc_per_node={gpus}")
    ceilings = [str(PEERS / "ceilings.py"), str(folder), f"--batch-size={sizes.batch_size}"]
    jobs = {
        "ours": (
            "JPEGs",
            sizes.images,
            ["data=folder", f"data.root={folder}", "model.weights=null", f"batch_size={sizes.batch_size}"],
        ),
        "ours-array": (
            "images decoded before",
            sizes.images,
            ["data=array", f"data.path={array}", "model.weights=null", f"batch_size={sizes.array_batch_size}"],
        ),
        "ours-fake": (
            "FakeData",
            sizes.fake_images,
            [f"data.size={sizes.fake_images}", f"batch_size={sizes.batch_size}"],
        ),
    }
    return [
        Contender(
            name="ceilings",
            title="ceilings of the stages",
            command=[sys.executable, *ceilings, f"--seconds={sizes.ceiling_s:g}"],
        ),
        *(
            Contender(
                name=name,
                title=f"mgpu_ddp, {what}",
                gpus=gpus,
                command=[*start, "-m", "mgpu_ddp.infer", *job],
                rows=rows,
            )
            for name, (what, rows, job) in jobs.items()
        ),
    ]


def _peers(folder: Path, sizes: Sizes, gpus: int, workers: int) -> list[Contender]:
    """List what others do; their one measurement lasts longer than all of ours."""
    options = [str(folder), f"--batch-size={sizes.batch_size}", f"--workers={workers}", f"--gpus={gpus}"]
    options += [f"--seconds={sizes.seconds:g}", f"--warm-up={sizes.warm_up_s:g}"]
    tutorial = [sys.executable, str(PEERS / "tutorial.py"), str(TUTORIAL_IMAGES), "0", f"{sizes.seconds:g}"]
    contenders = [
        Contender(name="tutorial", title="the tutorial's script, FakeData", gpus=gpus, command=tutorial, once=True)
    ]
    for name, peer in PEER_SCRIPTS.items():
        start = torchrun("--standalone", f"--nproc_per_node={gpus}") if peer.distributed else [sys.executable]
        command = [*start, str(PEERS / peer.script), *options]
        contenders.append(Contender(name=name, title=peer.title, gpus=gpus, command=command, once=True))
    return contenders


def _pile(name: str, pile: Pile, work: Path, sizes: Sizes, args: argparse.Namespace, workers: int) -> list[Contender]:
    """List our job over a pile, plain DDP, and the decoder alone where it is the ceiling."""
    images, distinct = (pile.images, pile.distinct) if sizes.images >= pile.images else (16, 8)
    folder = make_pile(work, name, pile.make, images=images, distinct=distinct)
    batch_size = min(pile.batch_size, images // 4)
    torchrun_all = torchrun("--standalone", f"--nproc_per_node={args.gpus}")
    job = ["data=folder", f"data.root={folder}", "model.weights=null", f"batch_size={batch_size}"]
    options = [str(folder), f"--batch-size={batch_size}", f"--workers={workers}", f"--gpus={args.gpus}"]
    options += [f"--seconds={sizes.seconds:g}", f"--warm-up={sizes.warm_up_s:g}"]
    ceiling = [str(folder), "--decode-batches=32,64", "--files=64", f"--seconds={sizes.ceiling_s:g}"]
    start = [sys.executable] if args.gpus == 1 else torchrun_all
    contenders = [
        Contender(
            name=f"{name}-ours",
            title=f"mgpu_ddp, {pile.title}",
            gpus=args.gpus,
            command=[*start, "-m", "mgpu_ddp.infer", *job],
            rows=images,
        ),
        Contender(
            name=f"{name}-ddp",
            title=f"DDP, {pile.title}",
            gpus=args.gpus,
            command=[*torchrun_all, str(PEERS / "ddp.py"), *options],
            once=True,
        ),
    ]
    if pile.decodes_alone:
        command = [sys.executable, str(PEERS / "ceilings.py"), *ceiling]
        contenders.append(Contender(name=f"{name}-ceilings", title=f"the decoder, {pile.title}", command=command))
    return contenders


def _missing(name: str) -> str:
    needs = PEER_SCRIPTS[name].needs if name in PEER_SCRIPTS else ()
    return "not installed" if needs and not any(map(importlib.util.find_spec, needs)) else ""


def _best_peer(found: dict[str, Found]) -> str | None:
    peers = [name for name in PEER_SCRIPTS if name in found and found[name].rates()]
    return max(peers, key=lambda name: statistics.median(found[name].rates()), default=None)


def _rows(contenders: Sequence[Contender], found: dict[str, Found], sizes: Sizes, *, judged: bool) -> list[Row]:
    """Make the table; `judged` says whether the bars apply."""
    ceilings = found.get("ceilings", Found())
    titles = {contender.name: contender.title for contender in contenders}

    def bar(value: float) -> float | None:
        return value if judged else None

    def ours(name: str, least: float) -> Row:
        row = _plain(titles[name], found[name])
        if not judged:
            return row
        return replace(row, bar=f">= {least}/s", met=statistics.median(found[name].rates()) >= least)

    def of_stage(name: str, stage: str, title: str, least: float) -> list[Row]:
        alone = ceilings.rates(stage)
        return [_versus(f"  of {title} alone", found[name].rates(), alone, bar(least))] if alone else []

    done = {name for name, result in found.items() if result.rates()}
    rows: list[Row] = []
    if "ours" in done:
        rows.append(ours("ours", JPEG_RATE))
        whole = [sizes.images / wall_s for wall_s in found["ours"].wall_s]
        rows.append(Row(name="  start-up and proof included", value=rate(whole)))
        rows += of_stage("ours", "decode", "decoding", OF_DECODE)
        if (best := _best_peer(found)) is not None:
            rivals = found[best].rates()
            rows.append(_versus(f"  times the best peer ({best})", found["ours"].rates(), rivals, bar(OF_BEST_PEER)))
    rows += [_peer(titles[name], found[name], found.get("ours", Found())) for name in PEER_SCRIPTS if name in found]
    if "ours-array" in done:
        rows.append(ours("ours-array", ARRAY_RATE))
        rows += of_stage("ours-array", "forward", "the forward pass", OF_FORWARD)
    if "ours-fake" in done:
        rows.append(_plain(titles["ours-fake"], found["ours-fake"]))
        rows += of_stage("ours-fake", "generate", "the generator", OF_GENERATOR)
    if "tutorial" in found:
        rows.append(_peer(titles["tutorial"], found["tutorial"], found.get("ours-fake", Found())))
    for name, pile in PILES.items():
        if f"{name}-ours" in done:
            ours_found, alone = found[f"{name}-ours"], found.get(f"{name}-ceilings", Found()).rates("decode")
            rows.append(_plain(titles[f"{name}-ours"], ours_found))
            rows += [_versus("  of decoding alone", ours_found.rates(), alone, None)] if alone else []
            rows.append(_peer(f"DDP, {pile.title}", found[f"{name}-ddp"], ours_found))
    failed = [c for c in contenders if found[c.name].problem and not c.once]
    return rows + [Row(name=titles[c.name], value=found[c.name].problem) for c in failed]


def _plain(name: str, result: Found) -> Row:
    return Row(name=name, wall_s=result.wall_s, value=rate(result.rates()))


def _versus(name: str, ours: Sequence[float], theirs: Sequence[float], limit: float | None) -> Row:
    """Make the row of our rate as a multiple of theirs, which is the figure shown."""
    return replace(compare(name, ours, theirs, bar=limit), value=rate(theirs))


def _peer(name: str, result: Found, ours: Found) -> Row:
    """Make the row of a peer's rate, and ours as a multiple of it."""
    if not result.rates():
        return Row(name=name, value=result.problem or "not yet measured")
    row = _plain(name, result)
    if not ours.rates():
        return row
    return replace(row, ratio=statistics.median(ours.rates()) / statistics.median(result.rates()))


def _groups(found: dict[str, Found]) -> dict[str, Sequence[Bar]]:
    """Group what was measured by job: our rate, the ceiling, the best of the others."""
    ceilings, best = found.get("ceilings", Found()), _best_peer(found)
    best_label = f"best other: {PEER_SCRIPTS[best].title.partition(',')[0]}" if best else ""
    groups: dict[str, Sequence[Bar]] = {}
    photos = found.get("photos-ceilings", Found())
    for job, ours, alone, ceiling, other, others in (
        ("Small JPEGs (500×375)", "ours", ceilings.rates("decode"), "decoding alone", best, best_label),
        ("Photos of 12 megapixels", "photos-ours", photos.rates("decode"), "decoding alone", "photos-ddp", "plain DDP"),
        ("A web mix", "web-ours", [], "", "web-ddp", "plain DDP"),
        ("Images decoded before", "ours-array", ceilings.rates("forward"), "forward pass alone", None, ""),
        ("FakeData", "ours-fake", ceilings.rates("generate"), "generator alone", "tutorial", "the tutorial's script"),
    ):
        bars = [
            Bar(label=label, rate=statistics.median(rates), colour=colour)
            for label, rates, colour in (
                ("mgpu_ddp", found.get(ours, Found()).rates(), OURS),
                (ceiling, alone, CEILING),
                (others, found.get(other or "", Found()).rates(), OTHER),
            )
            if rates
        ]
        if bars:
            groups[job] = bars
    return groups
