"""The values that each section of a job's page shows; a section that has nothing to show is None."""

import json
import logging
from collections import Counter
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mgpu_ddp.config.resolved import RANDOM
from mgpu_ddp.data.image_names import describe
from mgpu_ddp.errors import plural
from mgpu_ddp.inference import clock
from mgpu_ddp.output.manifest import Manifest
from mgpu_ddp.output.regular_files import open_regular
from mgpu_ddp.reporting.class_table import ClassTable
from mgpu_ddp.reporting.metrics import all_starts
from mgpu_ddp.reporting.provenance import provenance, source
from mgpu_ddp.reporting.render import shorten
from mgpu_ddp.reporting.table_stats import TableStats
from mgpu_ddp.reporting.text import RANDOM_WEIGHTS, duration, gibibytes

log = logging.getLogger("mgpu_ddp")

Section = dict[str, Any]

CLASSES_SHOWN = 20
LABELS_SHOWN = 200
RANKS_SHOWN = 32
STARTS_SHOWN = 20
FACTS_SHOWN = 200
ERRORS_SHOWN = 500
ERRORS_OF_A_KIND = 100
ERRORS_CHARACTERS = 100_000
ERRORS_READ = 100_000
FEWEST_BINS = 8
"""Fewer stretches of time make no curve."""
LONGEST_LINE = 1 << 20
STAGES = {"startup_s": "start-up", **clock.STAGES}
TOPS = {"top1": "top-1", "top5": "top-5"}


def summary(manifest: Manifest, accuracy: Section | None, status: Section, metrics: Section, home: Path) -> Section:
    rows = manifest.prefix - manifest.start
    cards = [
        ("status", status.get("status", "unknown")),
        ("rows", f"{rows:,} of {manifest.stop - manifest.start:,}"),
        ("errors", f"{manifest.errors:,}"),
    ]
    shares = accuracy or {}
    cards += [(name, f"{shares[key]:.2%}") for key, name in TOPS.items() if shares.get(key) is not None]
    of_last = ""
    if len(manifest.starts) > 1:
        of_last = " of the last start"
        cards.append((f"time of all {len(manifest.starts):,} starts", duration(all_starts(manifest)["wall_s"])))
    if "images_per_s" in metrics:
        rate = "images/s, steady" if metrics.get("steady", True) else "images/s"
        cards.append((f"{rate}{of_last}", f"{metrics['images_per_s']:,.1f}"))
    if manifest.starts or "wall_s" in metrics:
        # One that was killed has left no metrics.
        wall_s = manifest.starts[-1].wall_s if manifest.starts else metrics["wall_s"]
        cards.append((f"time{of_last}", duration(wall_s)))
    return {
        "model": manifest.fingerprint.get("model.name"),
        "source": source(manifest),
        "device": manifest.fingerprint.get("runtime.device"),
        "precision": manifest.fingerprint.get("runtime.precision"),
        "provenance": provenance(manifest),
        "folder": home,
        "notices": notices(manifest, status, metrics),
        "cards": cards,
    }


def notices(manifest: Manifest, status: Section, metrics: Section) -> list[str]:
    """Sentences that a reader should not miss."""
    found = []
    if manifest.weights == RANDOM:
        found.append(RANDOM_WEIGHTS)
    if status.get("reason"):
        found.append(str(status["reason"]))
    if metrics.get("nonfinite"):
        found.append(f"{plural(metrics['nonfinite'], 'row')} with NaN or Inf in the outputs, recorded as errors")
    if split := sum(part.split_rows for part in manifest.parts):
        found.append(f"{plural(split, 'row')} predicted in smaller batches, for lack of memory")
    if manifest.starts and not all_starts(manifest)["timed"]:
        found.append("earlier starts were not timed: times and rates are of the later ones")
    if manifest.left_out:
        found.append(describe(manifest.left_out))
    return found


def starts(manifest: Manifest) -> Section | None:
    if len(manifest.starts) < 2:
        return None
    shown = manifest.starts[-STARTS_SHOWN:]
    return {
        "rows": [
            {
                "number": len(manifest.starts) - len(shown) + place,
                "began": f"{datetime.fromtimestamp(each.began, UTC):%Y-%m-%d %H:%M} UTC",
                "ranks": each.ranks,
                "rows": each.rows,
                "wall_s": each.wall_s,
                "images_per_s": each.rows / each.wall_s if each.wall_s else 0.0,
            }
            for place, each in enumerate(shown, start=1)
        ],
        "together": all_starts(manifest),
    }


def throughput(metrics: Section) -> Section | None:
    found = metrics.get("throughput", {})
    if len(found.get("rows", [])) < FEWEST_BINS:
        return None
    begin_s, bin_s = found["from_s"], found["bin_s"]
    return {
        "images_per_s": [rows / bin_s for rows in found["rows"]],
        "begin_s": begin_s,
        "end_s": begin_s + bin_s * len(found["rows"]),
    }


def stages(metrics: Section) -> Section | None:
    ranks = metrics.get("ranks", [])
    if not ranks:
        return None
    names = [*STAGES.values(), "the rest"]
    spent = [_seconds_by_stage(rank) for rank in ranks[:RANKS_SHOWN]]
    longest = max(rank["wall_s"] for rank in ranks) or 1.0
    workers: Counter[str] = Counter()
    for rank in ranks:
        workers.update(rank["workers_s"])
    means = [sum(seconds) / len(spent) for seconds in zip(*spent, strict=True)]
    return {
        "bottleneck": metrics["bottleneck"],
        "remedy": metrics["remedy"],
        "legend": [(f"s{i}", f"{name} {duration(means[i])}") for i, name in enumerate(names)],
        "ranks": [
            {
                "number": rank["rank"],
                "shares": [(f"s{i}", seconds / longest) for i, seconds in enumerate(each)],
                "title": ", ".join(f"{name} {duration(seconds)}" for name, seconds in zip(names, each, strict=True)),
                "rows": rank["rows"],
                "images_per_s": rank["images_per_s"],
                "batch_p50_ms": rank["batch_p50_ms"],
                "batch_p95_ms": rank["batch_p95_ms"],
            }
            for rank, each in zip(ranks, spent, strict=False)
        ],
        "left_out": len(ranks) - len(spent),
        "workers": workers.most_common(),
    }


def _seconds_by_stage(rank: Section) -> list[float]:
    """Split a rank's wall time into the stages and the rest."""
    startup_s, *others = (rank[stage] for stage in STAGES)
    # Start-up ends with the first prediction, whose stages are counted twice.
    startup_s = min(startup_s, max(0.0, rank["wall_s"] - sum(others)))
    rest = max(0.0, rank["wall_s"] - startup_s - sum(others))
    return [startup_s, *others, rest]


def accuracy(stats: TableStats, classes: ClassTable) -> Section | None:
    shares = stats.accuracy
    if shares is None:
        return None
    worst = sorted(stats.per_class(classes), key=lambda row: (row["top1"], -row["rows"]))
    return {
        "compared": shares["compared"],
        "labelled": shares["labelled"],
        "how": shares["how"],
        "tops": [(name, shares[key]) for key, name in TOPS.items() if shares[key] is not None],
        "has_top5": stats.top5 is not None,
        "labels": worst[:LABELS_SHOWN],
        "num_labels": len(worst),
    }


def predicted_classes(stats: TableStats, classes: ClassTable) -> Section | None:
    total = int(stats.preds.sum())
    if not total:
        return None
    order = (-stats.preds).argsort(kind="stable")[:CLASSES_SHOWN]
    rows: list[Section] = [
        {"name": classes.name(number), "rows": int(stats.preds[number])}
        for number in order.tolist()
        if stats.preds[number]
    ]
    others = int((stats.preds > 0).sum()) - len(rows)
    if others:
        rows.append({"name": None, "rows": total - sum(row["rows"] for row in rows), "others": others})
    bins = np.flatnonzero(stats.confidence).tolist()
    width = 1 / len(stats.confidence)
    words = [f"{stats.confidence[i]:,} from {i * width:.2f} to {(i + 1) * width:.2f}" for i in bins]
    return {
        "rows": rows,
        "largest": max(row["rows"] for row in rows),
        "total": total,
        "confidence": stats.confidence.tolist(),
        "confidence_has_shape": len(bins) > 2,
        "confidence_words": "; ".join(words),
    }


def errors(run_dir: Path, manifest: Manifest) -> Section | None:
    if not manifest.errors:
        return None
    kinds: Counter[str] = Counter()
    rows: list[Section] = []
    characters = 0
    try:
        with open_regular(run_dir / "errors.jsonl") as file:
            for line in islice(iter(lambda: file.readline(LONGEST_LINE), b""), ERRORS_READ):
                error = json.loads(line)
                row = {"index": error["index"], "path": error["path"] or "", "reason": error["reason"]}
                kind = str(row["reason"]).partition(":")[0]
                kinds[kind] += 1
                # Of each kind some, so that none is crowded out.
                if len(rows) < ERRORS_SHOWN and kinds[kind] <= ERRORS_OF_A_KIND and characters < ERRORS_CHARACTERS:
                    rows.append(row)
                    characters += len(shorten(row["path"])) + len(shorten(row["reason"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("%s cannot be read: %s", run_dir / "errors.jsonl", error)
    return {
        "total": manifest.errors,
        "kinds": kinds.most_common(CLASSES_SHOWN),
        "rows": rows,
        "left_out": manifest.errors - len(rows),
    }


def setup(manifest: Manifest, metrics: Section) -> Section:
    """The machines and the settings of a job."""
    ranks = metrics.get("ranks", [])
    machines = Counter((rank.get("host", "?"), rank.get("device", "?")) for rank in ranks)
    facts = {
        "ranks": ", then ".join(map(str, manifest.world_sizes)),
        "batch_size": manifest.batch_size,
        "parts": f"{len(manifest.parts):,}",
        "peak memory": f"{gibibytes(metrics['peak_host_bytes'])} of the host" if ranks else "?",
        "peak GPU memory": gibibytes(metrics["peak_gpu_bytes"]) if metrics.get("peak_gpu_bytes") else "none",
        **manifest.versions,
        **manifest.fingerprint,
    }
    return {"machines": machines.most_common(RANKS_SHOWN), "facts": list(facts.items())[:FACTS_SHOWN]}
