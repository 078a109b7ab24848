"""The rates of a table as bars."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benching.children import say
from benching.table import Row

OURS, CEILING, PEER = "#2a6f97", "#c9ccd1", "#e07a5f"


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw the rate of every row that has one, on a logarithmic axis."""
    if (pyplot := pyplot_or_none()) is None:
        return
    rates = [(row.name, _rate(row)) for row in rows]
    shown = [(name, rate) for name, rate in rates if rate is not None and not name.startswith(("  times", "  start"))]
    if not shown:
        return
    names, values = zip(*reversed(shown), strict=True)
    colours = [OURS if n.startswith("mgpu_ddp") else CEILING if n.startswith("  of") else PEER for n in names]
    figure, axes = pyplot.subplots(figsize=(9, 0.4 * len(names) + 1.2), layout="constrained")
    bars = axes.barh([name.replace("  of ", "ceiling: ") for name in names], values, color=colours)
    axes.bar_label(bars, labels=[f"{value:,.0f}" for value in values], padding=4, fontsize=9)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_title(title, fontsize=10, loc="left")
    save(figure, path)


def pyplot_or_none() -> Any:
    """matplotlib's pyplot without a display; None, and a line that says so, where it is not installed."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        say("no plot: matplotlib is not installed")
        return None
    return pyplot


def save(figure: Any, path: Path) -> None:
    """Write a figure without its upper and right frame, and say where it is."""
    from matplotlib import pyplot

    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    print(path)


def _rate(row: Row) -> float | None:
    match = re.fullmatch(r"([\d,.]+) images/s", row.value)
    return float(match[1].replace(",", "")) if match else None
