"""The picture of a sweep: throughput with its spread, and peak memory below it."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from mgpu_ddp.output.atomic_files import replace_bytes
from mgpu_ddp.sweep.results import memory_of

INK, MUTED, RED = "#1f2328", "#8b949e", "#cf222e"
COLOURS = ("#0969da", "#bf8700", "#1a7f37", "#8250df", "#bc4c00", "#57606a")
MAX_SERIES = len(COLOURS)


def draw(points: Sequence[dict[str, Any]], swept: Sequence[str], chosen: Sequence[dict[str, Any]], to: Path) -> None:
    """Draw a sweep along `batch_size`, or else its first key; every choice of the other keys is a line."""
    along = "batch_size" if "batch_size" in swept else next(iter(swept), None)
    others = [key for key in swept if key != along]
    values = list(dict.fromkeys(point["values"].get(along) for point in points))
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) and value > 0 for value in values)
    if numeric:
        values.sort()
    logarithmic = numeric and len(values) > 2 and values[-1] >= 4 * values[0]
    places = {value: float(value) if numeric else float(i) for i, value in enumerate(values)}
    lines: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        lines.setdefault(", ".join(f"{key}={point['values'][key]}" for key in others), []).append(point)

    figure = Figure(figsize=(8, 5.6), dpi=150, layout="constrained")
    rate, memory = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    kind, words = memory_of(points)
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % MAX_SERIES]
        style = "-" if number < MAX_SERIES else "--"
        _line(rate, memory, line, along, places, kind, colour=colour, style=style if numeric else "", name=name)
    top = max((point["fastest"] or 0.0 for point in points), default=0.0) or 1.0
    for point in points:
        x = places[point["values"].get(along)]
        if point["values"] in chosen:
            y = point["images_per_s"]
            rate.plot(x, y, "o", markersize=13, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.4)
            named = ", ".join(f"{key}={value}" for key, value in point["values"].items())
            title = f"recommended: {named}, {y:,.0f} images/s" if len(chosen) == 1 else "recommended: what is circled"
            rate.set_title(title, loc="left", color=INK)
        elif point["images_per_s"] is None:
            rate.plot(x, 0.04 * top, "x", color=RED, markersize=9, markeredgewidth=2)
            word = {"oom": "OOM", "skipped": ""}.get(point["status"], point["status"])
            rate.annotate(word, (x, 0.04 * top), xytext=(0, 8), textcoords="offset points", ha="center", color=RED)
    rate.set_ylabel("images/s")
    rate.set_ylim(0, 1.12 * top)
    memory.set_ylabel(f"{words},\nGiB")
    memory.set_ylim(0, 1.2 * max(point[kind] for point in points) / 2**30 or 1)
    memory.set_xlabel(along or "")
    if logarithmic:
        memory.set_xscale("log", base=2)
    memory.xaxis.set_major_locator(FixedLocator(list(places.values())))
    memory.xaxis.set_minor_locator(NullLocator())
    memory.set_xticks(list(places.values()), [str(value) for value in places])
    if len(lines) > 1:
        rate.legend(frameon=False, fontsize=9)
    if any(point["repeats"] > 1 for point in points):
        rate.set_ylabel("images/s, median and range of the repeats")
    for axes in (rate, memory):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=MUTED, alpha=0.25)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    replace_bytes(to, buffer.getvalue())


def _line(
    rate: Axes,
    memory: Axes,
    points: Sequence[dict[str, Any]],
    along: str | None,
    places: dict[Any, float],
    kind: str,
    *,
    colour: str,
    style: str,
    name: str,
) -> None:
    good = sorted(
        (point for point in points if point["images_per_s"]), key=lambda point: places[point["values"].get(along)]
    )
    if good:
        x = [places[point["values"].get(along)] for point in good]
        y = [point["images_per_s"] for point in good]
        spread = [
            [point["images_per_s"] - point["slowest"] for point in good],
            [point["fastest"] - point["images_per_s"] for point in good],
        ]
        rate.errorbar(x, y, yerr=spread, fmt=f"o{style}", color=colour, capsize=3, markersize=5, label=name or None)
    used = sorted((places[point["values"].get(along)], point[kind] / 2**30) for point in points if point[kind])
    memory.plot([x for x, _ in used], [y for _, y in used], f"o{style}", color=colour, markersize=4)
