"""The results of a sweep, as `sweep.json` holds them: one row for each job, merged into one for each point."""

import json
import statistics
from collections.abc import Sequence
from typing import Any

SWEEP_FILE, PLOT_FILE = "sweep.json", "sweep.png"


def merge_repeats(jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge the repeats of each point into one row, in the order of the first of each."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in jobs:
        groups.setdefault(json.dumps(row["values"]), []).append(row)
    return [_merge(rows) for rows in groups.values()]


def _merge(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge rows of one point: the median rate and its range, the highest peaks, the first bad status."""
    rates = [row["images_per_s"] for row in rows if row["status"] == "complete" and row.get("images_per_s")]
    bad = [row for row in rows if row["status"] != "complete"]
    whole = rates if not bad else []
    return {
        "values": rows[0]["values"],
        "status": bad[0]["status"] if bad else "complete",
        "reason": bad[0]["reason"] if bad else None,
        "images_per_s": statistics.median(whole) if whole else None,
        "slowest": min(rates, default=None),
        "fastest": max(rates, default=None),
        "startup_s": statistics.median([row["startup_s"] for row in rows if "startup_s" in row] or [0.0]),
        "peak_gpu_bytes": max(row.get("peak_gpu_bytes", 0) for row in rows),
        "peak_host_bytes": max(row.get("peak_host_bytes", 0) for row in rows),
        "steady_s": min((row.get("steady_s", 0.0) for row in rows if row["status"] == "complete"), default=0.0),
        "used_batch_size": rows[-1].get("used_batch_size"),
        "repeats": len(rows),
    }


def peak_memory(points: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Choose the memory to show: the GPU's if any was used. Returns its key in a point, and its name in words."""
    on_gpu = any(point["peak_gpu_bytes"] for point in points)
    return ("peak_gpu_bytes", "GPU memory") if on_gpu else ("peak_host_bytes", "host memory")


def named(values: dict[str, Any]) -> str:
    """`key=value, key=value`."""
    return ", ".join(f"{key}={value}" for key, value in values.items())


def as_list(recommended: Any) -> list[dict[str, Any]]:
    """The recommended points: several where the work itself is swept, else one or none."""
    if isinstance(recommended, list):
        return recommended
    return [recommended] if recommended is not None else []
