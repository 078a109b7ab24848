"""`report.html`: one page to look at after a job, made from its run folder alone.

Rank 0 writes it at the end of a job; `python -m mgpu_ddp.report run=DIR` writes it again.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgpu_ddp.data.samples import Samples
from mgpu_ddp.errors import reason_of
from mgpu_ddp.output.atomic_files import replace_bytes
from mgpu_ddp.output.manifest import Manifest
from mgpu_ddp.output.regular_files import read_object
from mgpu_ddp.reporting import page_sections
from mgpu_ddp.reporting.class_table import ClassTable
from mgpu_ddp.reporting.gallery import gallery
from mgpu_ddp.reporting.render import render, shorten
from mgpu_ddp.reporting.table_stats import TableStats

log = logging.getLogger("mgpu_ddp")

PAGE = "report.html"
MAX_BYTES = 2_000_000
THUMBNAILS_S = 5.0
"""After so many seconds, a job reads no further image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobResults:
    """A job's results, from which its page is made."""

    run_dir: Path
    home: Path
    """Where the folder will be found: the same, but for a job that replaces another one's folder when it completes."""
    manifest: Manifest
    classes: ClassTable
    stats: TableStats
    samples: Samples | None
    """None where they are gone."""


def try_write_page(results: JobResults) -> None:
    """Write the page, or log why not: the table is proved by now, so a page that fails ends no job. Rank 0 only."""
    try:
        write_page(results, thumbnails_s=THUMBNAILS_S)
    except Exception as error:
        log.warning("%s was not written: %s", results.run_dir / PAGE, reason_of(error))


def write_page(results: JobResults, *, thumbnails_s: float) -> Path:
    """Write the page, reading images for at most so many seconds.

    Raises:
        UsageError: a file of the run folder cannot be read.
    """
    run_dir, manifest, stats = results.run_dir, results.manifest, results.stats
    status, metrics = read_object(run_dir / "status.json"), read_object(run_dir / "metrics.json")
    deadline = time.monotonic() + thumbnails_s
    sections: dict[str, Any] = {
        "title": shorten(f"{manifest.fingerprint.get('model.name')} · {results.home.name}"),
        "summary": page_sections.summary(manifest, stats.accuracy, status, metrics, results.home),
        "throughput": page_sections.throughput(metrics),
        "stages": page_sections.stages(metrics),
        "accuracy": page_sections.accuracy(stats, results.classes),
        "classes": page_sections.predicted_classes(stats, results.classes),
        "samples": gallery(run_dir, manifest, results.classes, stats, results.samples, deadline),
        "errors": page_sections.errors(run_dir, manifest),
        "starts": page_sections.starts(manifest),
        "setup": page_sections.setup(manifest, metrics),
    }
    page = render("job.html", **sections).encode()
    if len(page) > MAX_BYTES:
        # Of hundreds of names of hundreds of characters, each of which takes several bytes.
        page = render("job.html", **sections | {"samples": None}).encode()
    replace_bytes(run_dir / PAGE, page)
    return run_dir / PAGE
