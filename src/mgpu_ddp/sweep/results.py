"""What a sweep's ledger holds: its jobs, one row each, and what the repeats of each point have in common."""

import json
import statistics
from collections.abc import Sequence
from typing import Any

LEDGER, PICTURE = "sweep.json", "sweep.png"


def points_of(jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the jobs of each point have in common, in the order of the first of each."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in jobs:
        groups.setdefault(json.dumps(row["values"]), []).append(row)
    return [_together(rows) for rows in groups.values()]


def _together(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the repeats of one point say: the median rate and its range, the highest peaks, the worst status."""
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


def memory_of(points: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Which memory is worth showing: the name of its peak in a point, and in words."""
    on_gpu = any(point["peak_gpu_bytes"] for point in points)
    return ("peak_gpu_bytes", "GPU memory") if on_gpu else ("peak_host_bytes", "host memory")
