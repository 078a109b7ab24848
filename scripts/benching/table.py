"""Measurements as ratios, one table and one JSON file."""

import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common.showing import print_columns

PACKAGES = (
    "mgpu-ddp",
    "torch",
    "torchvision",
    "triton",
    "numpy",
    "pillow",
    "pyarrow",
    "accelerate",
    "lightning",
    "pytorch-lightning",
    "ray",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A line of the table."""

    name: str
    wall_s: list[float] = field(default_factory=list)
    value: str = ""
    """The figure that is compared, with its unit."""
    ratio: float | None = None
    rounds: list[float] = field(default_factory=list)
    """The ratio in each single round."""
    bar: str = ""
    met: bool | None = None


def rate(measured: Sequence[float]) -> str:
    """Name the median of some rates."""
    return f"{statistics.median(measured):,.1f} images/s"


def compare(
    name: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    bar: float | None = None,
    wall_s: Sequence[float] = (),
) -> Row:
    """Make the row of a rate against another, of which it must reach `bar` times where one is set."""
    ratio = statistics.median(ours) / statistics.median(theirs)
    return Row(
        name=name,
        wall_s=list(wall_s),
        value=rate(ours),
        ratio=ratio,
        rounds=[a / b for a, b in zip(ours, theirs, strict=True)] if len(ours) == len(theirs) else [],
        bar="" if bar is None else f">= {bar:g}",
        met=None if bar is None else ratio >= bar,
    )


def print_table(rows: Sequence[Row]) -> None:
    """Print the rows below their heads."""
    lines = [("", "wall s: min", "median", "max", "", "ratio", "per round", "bar", "")]
    for row in rows:
        wall = [f"{f(row.wall_s):.2f}" for f in (min, statistics.median, max)] if row.wall_s else [""] * 3
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        per_round = f"{min(row.rounds):.2f}-{max(row.rounds):.2f}" if row.rounds else ""
        verdict = "" if row.met is None else "met" if row.met else "MISSED"
        lines.append((row.name, *wall, row.value, ratio, per_round, row.bar, verdict))
    print_columns(lines)


def write_report(out: Path, settings: dict[str, Any], rows: Sequence[Row], details: dict[str, Any]) -> None:
    """Write every figure, with what it was measured on, to bench.json."""
    machine = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": _cpu_name(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "threads_set": {key: value for key, value in os.environ.items() if key.endswith("_NUM_THREADS")},
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }
    report = {"machine": machine, "settings": settings, "rows": [asdict(row) for row in rows], **details}
    (out / "bench.json").write_text(json.dumps(report, indent=1) + "\n")


def print_machine(out: Path) -> None:
    """Print what a table was measured on, and where its figures are."""
    machine = json.loads((out / "bench.json").read_text())["machine"]
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
    print(f"\n{machine['cpus']} CPUs ({machine['cpu']}), Python {machine['python']}, {machine['date']}")
    print(f"{versions}\n{out / 'bench.json'}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
