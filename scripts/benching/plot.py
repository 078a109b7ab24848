"""Rates as bars, grouped by job."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot

mpl.use("Agg")

OURS, CEILING, OTHER = "#2a6f97", "#c9ccd1", "#e07a5f"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """A rate in images/s and what reached it."""

    label: str
    rate: float
    colour: str


def plot_groups(groups: dict[str, Sequence[Bar]], path: Path, title: str) -> None:
    """Draw the bars of each job below its name, on a linear axis."""
    height = sum(len(bars) + 1 for bars in groups.values())
    figure, axes = pyplot.subplots(figsize=(9, 0.34 * height + 0.9), layout="constrained")
    place, ticks = 0, []
    for job, bars in groups.items():
        axes.text(0, place, f" {job}", fontsize=10, fontweight="bold", va="center")
        for bar in bars:
            place += 1
            drawn = axes.barh(place, bar.rate, color=bar.colour, height=0.8)
            axes.bar_label(drawn, labels=[f"{bar.rate:,.0f}"], padding=4, fontsize=9)
            ticks.append((place, bar.label))
        place += 1
    axes.set_yticks(*zip(*ticks, strict=True), fontsize=9)
    axes.set_ylim(place - 0.4, -0.6)
    axes.tick_params(left=False)
    axes.margins(x=0.1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel("images/s", fontsize=9)
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    print(path)
