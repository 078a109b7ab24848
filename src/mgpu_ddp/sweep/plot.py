"""The plot of a sweep: throughput with its spread, and peak memory below it."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from mgpu_ddp.output.atomic_files import replace_bytes
from mgpu_ddp.sweep.results import named, peak_memory

INK, MUTED, RED = "#1f2328", "#8b949e", "#cf222e"
COLOURS = ("#0969da", "#bf8700", "#1a7f37", "#8250df", "#bc4c00", "#57606a")


@dataclass(frozen=True, kw_only=True, slots=True)
class XAxis:
    """The swept key that the plot runs along, and where each of its values stands."""

    key: str | None
    positions: dict[Any, float]
    numeric: bool
    logarithmic: bool

    def position(self, point: dict[str, Any]) -> float:
        return self.positions[point["values"].get(self.key)]


def draw(points: Sequence[dict[str, Any]], swept: Sequence[str], chosen: Sequence[dict[str, Any]], to: Path) -> None:
    """Draw a sweep along `batch_size`, or else its first key; each choice of the other keys is a line."""
    axis = _x_axis(points, swept)
    figure = Figure(figsize=(8, 5.6), dpi=150, layout="constrained")
    rate, memory = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    _draw_lines(rate, memory, points, axis, others=[key for key in swept if key != axis.key])
    top = max((point["fastest"] or 0.0 for point in points), default=0.0) or 1.0
    _mark_chosen(rate, points, axis, chosen)
    _mark_failed(rate, points, axis, y=0.04 * top)
    _label_axes(rate, memory, points, axis, top)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    replace_bytes(to, buffer.getvalue())


def _x_axis(points: Sequence[dict[str, Any]], swept: Sequence[str]) -> XAxis:
    key = "batch_size" if "batch_size" in swept else next(iter(swept), None)
    values = list(dict.fromkeys(point["values"].get(key) for point in points))
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) and value > 0 for value in values)
    if numeric:
        values.sort()
    return XAxis(
        key=key,
        positions={value: float(value) if numeric else float(i) for i, value in enumerate(values)},
        numeric=numeric,
        logarithmic=numeric and len(values) > 2 and values[-1] >= 4 * values[0],
    )


def _draw_lines(
    rate: Axes, memory: Axes, points: Sequence[dict[str, Any]], axis: XAxis, *, others: Sequence[str]
) -> None:
    peak, _ = peak_memory(points)
    lines: dict[str, list[dict[str, Any]]] = {}
    for point in sorted(points, key=axis.position):
        lines.setdefault(named({key: point["values"][key] for key in others}), []).append(point)
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        style = ("-" if number < len(COLOURS) else "--") if axis.numeric else ""
        good = [point for point in line if point["images_per_s"]]
        if good:
            y = [point["images_per_s"] for point in good]
            below = [point["images_per_s"] - point["slowest"] for point in good]
            above = [point["fastest"] - point["images_per_s"] for point in good]
            looks: dict[str, Any] = {"fmt": f"o{style}", "color": colour, "capsize": 3, "markersize": 5}
            rate.errorbar(list(map(axis.position, good)), y, yerr=[below, above], label=name or None, **looks)
        used = [point for point in line if point[peak]]
        gibibytes = [point[peak] / 2**30 for point in used]
        memory.plot(list(map(axis.position, used)), gibibytes, f"o{style}", color=colour, markersize=4)
    if len(lines) > 1:
        rate.legend(frameon=False, fontsize=9)


def _mark_chosen(rate: Axes, points: Sequence[dict[str, Any]], axis: XAxis, chosen: Sequence[dict[str, Any]]) -> None:
    for point in points:
        if point["values"] not in chosen:
            continue
        x, y = axis.position(point), point["images_per_s"]
        rate.plot(x, y, "o", markersize=13, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.4)
        title = f"{named(point['values'])}, {y:,.0f} images/s" if len(chosen) == 1 else "circled"
        rate.set_title(f"recommended: {title}", loc="left", color=INK)


def _mark_failed(rate: Axes, points: Sequence[dict[str, Any]], axis: XAxis, *, y: float) -> None:
    for point in points:
        if point["images_per_s"] is None:
            x = axis.position(point)
            rate.plot(x, y, "x", color=RED, markersize=9, markeredgewidth=2)
            word = {"oom": "OOM", "skipped": ""}.get(point["status"], point["status"])
            rate.annotate(word, (x, y), xytext=(0, 8), textcoords="offset points", ha="center", color=RED)


def _label_axes(rate: Axes, memory: Axes, points: Sequence[dict[str, Any]], axis: XAxis, top: float) -> None:
    peak, words = peak_memory(points)
    repeated = any(point["repeats"] > 1 for point in points)
    rate.set_ylabel("images/s, median and range of the repeats" if repeated else "images/s")
    rate.set_ylim(0, 1.12 * top)
    memory.set_ylabel(f"{words},\nGiB")
    memory.set_ylim(0, 1.2 * max(point[peak] for point in points) / 2**30 or 1)
    memory.set_xlabel(axis.key or "")
    if axis.logarithmic:
        memory.set_xscale("log", base=2)
    memory.xaxis.set_major_locator(FixedLocator(list(axis.positions.values())))
    memory.xaxis.set_minor_locator(NullLocator())
    memory.set_xticks(list(axis.positions.values()), [str(value) for value in axis.positions])
    for axes in (rate, memory):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=MUTED, alpha=0.25)
