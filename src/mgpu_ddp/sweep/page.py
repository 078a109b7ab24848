"""`report.html` of a sweep: its answer, its picture and its jobs on one page, made from the sweep's folder alone."""

import base64
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mgpu_ddp.output.atomic_files import replace_bytes
from mgpu_ddp.reporting.markup import Html, bars, document, foreign, joined, table, tag, void
from mgpu_ddp.sweep.results import LEDGER, PICTURE, memory_of, points_of

PAGE = "report.html"
WORDS = {"failed": "failed", "oom": "out of memory", "skipped": "skipped"}


def write_sweep_page(folder: Path) -> Path:
    """Write the page of a sweep folder.

    Raises:
        OSError, ValueError, KeyError, TypeError: the folder does not hold what a sweep has written.
    """
    ledger = json.loads((folder / LEDGER).read_text())
    jobs, swept = ledger["jobs"], ledger["swept"]
    points = points_of(jobs)
    title = f"Sweep over {', '.join(swept) or 'nothing'}"
    text = document(
        f"{title} · {folder.name}",
        _summary(title, folder, ledger, jobs),
        _picture(folder),
        _points(points, swept, ledger["recommended"]),
        _jobs(folder, jobs, swept),
    )
    replace_bytes(folder / PAGE, text.encode())
    return folder / PAGE


def _summary(title: str, folder: Path, ledger: dict[str, Any], jobs: Sequence[dict[str, Any]]) -> Html:
    statuses = [job["status"] for job in jobs]
    cards: list[tuple[str, object]] = [("status", ledger["status"]), ("jobs", f"{len(jobs):,}")]
    cards += [(name, n) for word, name in WORDS.items() if (n := statuses.count(word))]
    if ledger["best_images_per_s"]:
        cards.append(("images/s, the best", f"{ledger['best_images_per_s']:,.1f}"))
    devices = ", ".join(sorted({str(job["device"]) for job in jobs if job.get("device")}))
    chosen = ledger["recommended"]
    chosen = chosen if isinstance(chosen, list) else [chosen] if chosen else []
    answer = " or ".join(_named(values) for values in chosen)
    return joined(
        [
            tag("h1", foreign(title)),
            tag("p", foreign(f"{devices}, in {folder}" if devices else folder), class_="soft"),
            tag("div", *(tag("div", name, tag("b", value), class_="card") for name, value in cards), class_="cards"),
            tag("p", "Recommended: ", tag("b", foreign(answer)), ".") if answer else "",
        ]
    )


def _picture(folder: Path) -> Html:
    try:
        data = (folder / PICTURE).read_bytes()
    except OSError:
        return Html()
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return tag("figure", void("img", alt="throughput and peak memory", src=source, class_="picture"))


def _points(points: Sequence[dict[str, Any]], swept: Sequence[str], recommended: Any) -> Html:
    if not points:
        return Html()
    kind, words = memory_of(points)
    best = max((point["images_per_s"] or 0.0 for point in points), default=0.0) or 1.0
    chosen = recommended if isinstance(recommended, list) else [recommended]
    rows = []
    for point in points:
        rate = point["images_per_s"]
        name = "" if rate else _outcome(point)
        if point["values"] in chosen:
            name = tag("b", "recommended", class_="word")
        spread = f"{point['slowest']:,.1f} to {point['fastest']:,.1f}" if rate and point["repeats"] > 1 else ""
        rows.append(
            [
                *(foreign(point["values"][key]) for key in swept),
                bars([("s0", (rate or 0.0) / best)], f"{rate or 0.0:,.1f} images/s"),
                f"{rate:,.1f}" if rate else "",
                spread,
                f"{point[kind] / 2**30:.2f} GiB" if point[kind] else "",
                f"{point['startup_s']:.1f} s" if rate else "",
                name,
            ]
        )
    heads = [*swept, "", "images/s", "of the repeats", f"peak {words}", "start-up", ""]
    numbers = "n" * len(swept) + "wnnnn"
    return joined([tag("h2", "Points"), table(heads, rows, numbers=numbers)])


def _jobs(folder: Path, jobs: Sequence[dict[str, Any]], swept: Sequence[str]) -> Html:
    rows = []
    for job in jobs:
        rate = job.get("images_per_s")
        rows.append(
            [
                _linked(folder, job),
                *(foreign(job["values"][key]) for key in swept),
                _outcome(job),
                f"{rate:,.1f}" if rate else "",
                foreign(job.get("bottleneck") or ""),
            ]
        )
    heads = ["job", *swept, "", "images/s", "bottleneck"]
    return joined([tag("h2", "Jobs"), table(heads, rows, numbers="n" * (1 + len(swept)) + ".n")])


def _outcome(row: dict[str, Any]) -> Html:
    """How a job or a point ended, with the reason where it did not end well."""
    if row["status"] == "complete":
        return tag("span", "complete", class_="word")
    reason = f": {row['reason']}" if row.get("reason") else ""
    return tag("span", foreign(WORDS.get(row["status"], row["status"]) + reason), class_="bad")


def _linked(folder: Path, job: dict[str, Any]) -> Html:
    """A job's number, which leads to its own page where it has one."""
    name = f"{job['job']}, round {job['repeat']}"
    page = Path(job["run_dir"]) / PAGE if job.get("run_dir") else None
    if page is None or not page.exists():
        return foreign(name)
    # Never the name of a scheme, whatever the folder is called.
    return tag("a", name, href=f"./{quote(os.path.relpath(page, folder))}")


def _named(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())
