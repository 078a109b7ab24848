"""`report.html` of a sweep: its answer, its plot and its jobs on one page, made from the sweep's folder alone."""

import base64
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mgpu_ddp.output.atomic_files import replace_bytes
from mgpu_ddp.output.regular_files import open_regular, read_json
from mgpu_ddp.reporting.page import PAGE
from mgpu_ddp.reporting.render import render
from mgpu_ddp.sweep.results import PLOT_FILE, SWEEP_FILE, as_list, merge_repeats, named, peak_memory

STATUS_WORDS = {"failed": "failed", "oom": "out of memory", "skipped": "skipped"}


def write_sweep_page(folder: Path) -> Path:
    """Write the page of a sweep folder. Returns its path.

    Raises:
        OSError, ValueError, KeyError, TypeError: the folder does not hold what a sweep writes.
    """
    results = read_json(folder / SWEEP_FILE)
    jobs, swept, chosen = results["jobs"], results["swept"], as_list(results["recommended"])
    title = f"Sweep over {', '.join(swept) or 'nothing'}"
    points = merge_repeats(jobs)
    peak, memory = peak_memory(points)
    text = render(
        "sweep.html",
        title=f"{title} · {folder.name}",
        heading=title,
        folder=folder,
        devices=", ".join(sorted({str(job["device"]) for job in jobs if job.get("device")})),
        summary=_cards(results, jobs),
        recommended=" or ".join(map(named, chosen)),
        # Two points make no curve.
        plot=_plot(folder) if sum(bool(point["images_per_s"]) for point in points) > 2 else None,
        swept=swept,
        memory=memory,
        best_images_per_s=max((point["images_per_s"] or 0.0 for point in points), default=0.0),
        points=[_point(point, swept, peak, chosen) for point in points],
        jobs=[_job(folder, job, swept) for job in jobs],
    )
    replace_bytes(folder / PAGE, text.encode())
    return folder / PAGE


def _cards(results: dict[str, Any], jobs: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    statuses = [job["status"] for job in jobs]
    cards = [("status", results["status"]), ("jobs", f"{len(jobs):,}")]
    cards += [(words, f"{n:,}") for status, words in STATUS_WORDS.items() if (n := statuses.count(status))]
    if results["best_images_per_s"]:
        cards.append(("best images/s", f"{results['best_images_per_s']:,.1f}"))
    return cards


def _plot(folder: Path) -> str | None:
    """The plot as a data URI, None where it was not drawn."""
    try:
        with open_regular(folder / PLOT_FILE) as file:
            data = file.read()
    except OSError:
        return None
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _point(point: dict[str, Any], swept: Sequence[str], peak: str, chosen: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "settings": [point["values"][key] for key in swept],
        "recommended": point["values"] in chosen,
        "outcome": _outcome(point),
        "peak_bytes": point[peak],
        **{key: point[key] for key in ("status", "images_per_s", "slowest", "fastest", "startup_s", "repeats")},
    }


def _job(folder: Path, job: dict[str, Any], swept: Sequence[str]) -> dict[str, Any]:
    return {
        "name": f"{job['job']}, round {job['repeat']}",
        "link": _link(folder, job),
        "settings": [job["values"][key] for key in swept],
        "status": job["status"],
        "outcome": _outcome(job),
        "images_per_s": job.get("images_per_s"),
        "bottleneck": job.get("bottleneck") or "",
    }


def _outcome(row: dict[str, Any]) -> str:
    """How a job or a point ended, with the reason where it did not end well."""
    words = STATUS_WORDS.get(row["status"], row["status"])
    return f"{words}: {row['reason']}" if row.get("reason") else words


def _link(folder: Path, job: dict[str, Any]) -> str | None:
    """The address of a job's own page, None where it has none."""
    page = Path(job["run_dir"]) / PAGE if job.get("run_dir") else None
    if page is None or not page.exists():
        return None
    # With "./" no name of a folder reads as a scheme.
    return f"./{quote(os.path.relpath(page, folder))}"
