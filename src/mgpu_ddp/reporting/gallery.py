"""Samples as a page shows them: evenly spread ones, and the surest and least sure of the most frequent classes."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mgpu_ddp.data.samples import Samples
from mgpu_ddp.output.columns import OURS, ColumnType
from mgpu_ddp.output.formats import FORMATS, empty_table
from mgpu_ddp.output.manifest import ARRAY, Manifest
from mgpu_ddp.reporting.class_table import ClassTable
from mgpu_ddp.reporting.picked_rows import PickedRow
from mgpu_ddp.reporting.table_stats import TableStats
from mgpu_ddp.reporting.thumbnails import make_thumbnails

FIELDS = ("logits", "probs", "embedding")
CLASSES_SHOWN = 8
NUMBERS_SHOWN = 4
"""Entries that are shown of a list in a row."""


def gallery(
    run_dir: Path,
    manifest: Manifest,
    classes: ClassTable,
    stats: TableStats,
    samples: Samples | None,
    deadline: float,
) -> dict[str, Any] | None:
    """Describe the rows that were picked, reading no image after `deadline`; None where there are none."""
    picked = stats.picked
    frequent = (-stats.preds).argsort(kind="stable")[:CLASSES_SHOWN].tolist()
    by_class = [(number, *picked.of_class(number)) for number in frequent if stats.preds[number]]
    rows = [*picked.spread, *(row for _, most, least in by_class for row in (*most, *least))]
    if not rows:
        return None
    indices = [row.index for row in rows]
    thumbnails: dict[int, str | None] = dict.fromkeys(indices)
    left_out = 0
    if samples is not None:
        thumbnails, left_out = make_thumbnails(samples, indices, manifest, deadline)
    texts = {}
    if samples is None or not stats.preds.any() or manifest.fingerprint.get("data.name") == "script":
        texts = _texts(run_dir, manifest, indices)
    class_of, _ = classes.match()

    def described(some: Sequence[PickedRow]) -> list[dict[str, Any]]:
        found = []
        for row in some:
            if row.index not in thumbnails:
                continue
            path, columns = texts.get(row.index, (None, []))
            path = path or (samples.path(row.index) if samples is not None else None)
            known = class_of is not None and 0 <= row.label < len(class_of) and row.pred >= 0
            truth = int(class_of[row.label]) if class_of is not None and known else -1
            found.append(
                {
                    "name": path or f"sample {row.index}",
                    "thumbnail": thumbnails[row.index],
                    "class_name": classes.name(row.pred) if row.pred >= 0 else None,
                    "prob": row.prob,
                    "label": classes.label_name(row.label) if row.label >= 0 else None,
                    "is_right": row.pred == truth if truth >= 0 else None,
                    "columns": columns,
                }
            )
        return found

    ends = [(number, described(most), described(least)) for number, most, least in by_class]
    return {
        "spread": described(picked.spread),
        "classes": [
            {"name": classes.name(number), "rows": int(stats.preds[number]), "most": most, "least": least}
            for number, most, least in ends
            if most
        ],
        "left_out": left_out,
        "in_haste": deadline < math.inf,
        "unreadable": sum(uri is None for uri in thumbnails.values()),
    }


def _texts(run_dir: Path, manifest: Manifest, indices: Sequence[int]) -> dict[int, tuple[str | None, list[str]]]:
    """The path of rows by index, and their values beside those of a classifier, read from their parts."""
    types = [ColumnType.read(values) for values in manifest.columns]
    schema = empty_table(types).schema
    short = [each.name for each in types if math.prod(each.shape) <= NUMBERS_SHOWN]
    names = ["index", "path", *(name for name in short if name not in (*OURS, *FIELDS))]
    wanted = schema.empty_table().select(names).schema
    found: dict[int, tuple[str | None, list[str]]] = {}
    for part in manifest.parts:
        within = [index for index in indices if part.first <= index < part.stop]
        if within and part.file != ARRAY:
            table = FORMATS[manifest.output_format].read(run_dir / part.file, wanted)
            for row in table.take([index - part.first for index in within]).to_pylist():
                index, path = row.pop("index"), row.pop("path")
                found[index] = path, [_in_words(name, value) for name, value in row.items()]
    return found


def _in_words(name: str, value: Any) -> str:
    """A column's value in a row; of a long list of numbers the first, of lists in a list their number."""
    if not isinstance(value, list):
        return f"{name} {_number(value)}"
    if value and isinstance(value[0], list):
        return f"{len(value):,} {name}"
    numbers = ", ".join(map(_number, value[:NUMBERS_SHOWN]))
    return f"{name} {numbers or 'none'}{', …' if len(value) > NUMBERS_SHOWN else ''}"


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
