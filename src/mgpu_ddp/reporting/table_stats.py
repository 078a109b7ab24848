"""Statistics over all rows of a table: predicted classes, confidence, accuracy. Read back from the committed parts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mgpu_ddp.data.samples import Samples
from mgpu_ddp.output.formats import FORMATS
from mgpu_ddp.output.manifest import ARRAY, Manifest, Part
from mgpu_ddp.output.regular_files import map_array
from mgpu_ddp.reporting.class_table import ClassTable
from mgpu_ddp.reporting.picked_rows import Numbers, PickedRows, RowBlock

BINS = 20
TOP = 5
ARRAY_ROWS = 4096


@dataclass(kw_only=True, slots=True)
class TableStats:
    """Counts over all rows."""

    preds: Numbers
    """Rows of each predicted class."""
    confidence: Numbers
    """Rows by `prob`, in `BINS` of equal width from 0 to 1."""
    labelled: int
    """Rows with a label and a prediction."""
    how: str
    """How labels were matched to classes, or why they cannot be."""
    compared: Numbers | None
    """Rows of each label that stands for a class; None where labels cannot be matched."""
    top1: Numbers
    """Those of the compared rows whose prediction is right."""
    top5: Numbers | None
    """Those with the right class among their best five; None where rows name fewer, or there are no more."""
    picked: PickedRows

    @property
    def accuracy(self) -> dict[str, Any] | None:
        """Top-1 and top-5 accuracy over all labels, None where no row has one."""
        if not self.labelled:
            return None
        compared = 0 if self.compared is None else int(self.compared.sum())
        return {
            "compared": compared,
            "labelled": self.labelled,
            "how": self.how,
            "top1": int(self.top1.sum()) / compared if compared else None,
            "top5": int(self.top5.sum()) / compared if compared and self.top5 is not None else None,
        }

    def per_class(self, classes: ClassTable) -> list[dict[str, Any]]:
        """Top-1 and top-5 accuracy of each label that was compared."""
        if self.compared is None:
            return []
        return [
            {
                "label": label,
                "name": classes.label_name(label),
                "rows": int(self.compared[label]),
                "top1": float(self.top1[label] / self.compared[label]),
                "top5": None if self.top5 is None else float(self.top5[label] / self.compared[label]),
            }
            for label in np.flatnonzero(self.compared).tolist()
        ]


def count_rows(run_dir: Path, manifest: Manifest, classes: ClassTable, samples: Samples | None) -> TableStats:
    """Count all rows that the manifest lists, and pick some of them. Rank 0 only.

    `samples` know the labels of an array, which holds none itself.
    """
    class_of, how = classes.match()
    has_best = _has_best(manifest.fingerprint, classes.num_classes)
    labels = 0 if class_of is None else len(class_of)
    stats = TableStats(
        preds=np.zeros(classes.num_classes, np.int64),
        confidence=np.zeros(BINS, np.int64),
        labelled=0,
        how=how,
        compared=None if class_of is None else np.zeros(labels, np.int64),
        top1=np.zeros(labels, np.int64),
        top5=np.zeros(labels, np.int64) if has_best else None,
        picked=PickedRows(manifest.start, manifest.prefix, classes.num_classes),
    )
    for part in manifest.parts:
        for block in _read(run_dir, manifest, part, samples, best=has_best and class_of is not None):
            _count(stats, block, class_of)
            stats.picked.add(block)
    return stats


def _has_best(job: dict[str, Any], num_classes: int) -> bool:
    """True where rows name their best five classes, and a guess may miss those."""
    if num_classes <= TOP:
        return False
    if job["output.format"] == "npy":
        return bool(job["output.fields"] != ["embedding"])
    return "topk" in job["output.fields"] and job["output.topk"] >= TOP


def _count(stats: TableStats, block: RowBlock, class_of: Numbers | None) -> None:
    good = block.pred >= 0
    stats.preds += np.bincount(block.pred[good], minlength=len(stats.preds))
    stats.confidence += np.bincount((block.prob[good] * BINS).astype(np.int64).clip(0, BINS - 1), minlength=BINS)
    labelled = good & (block.label >= 0)
    stats.labelled += int(labelled.sum())
    if class_of is None or stats.compared is None:
        return
    known = labelled & (block.label < len(class_of))
    truth = np.where(known, class_of[np.where(known, block.label, 0)], -1)
    known &= truth >= 0
    right = known & (block.pred == truth)
    stats.compared += np.bincount(block.label[known], minlength=len(class_of))
    stats.top1 += np.bincount(block.label[right], minlength=len(class_of))
    if stats.top5 is not None and block.best is not None:
        near = known & (block.best == truth[:, None]).any(axis=1)
        stats.top5 += np.bincount(block.label[near], minlength=len(class_of))


def _read(run_dir: Path, manifest: Manifest, part: Part, samples: Samples | None, *, best: bool) -> Iterator[RowBlock]:
    if part.file == ARRAY:
        yield from _read_array(run_dir, manifest, part, samples, best=best)
        return
    names = ["index", "label", "error"]
    if manifest.has_classes:
        names += ["pred", "prob", *(["topk_index"] if best else [])]
    table = FORMATS[manifest.output_format].columns(run_dir / part.file, names)
    pred, prob = np.full(table.num_rows, -1), np.full(table.num_rows, np.nan, dtype=np.float32)
    if manifest.has_classes:
        pred, prob = _numbers(table["pred"]), table["prob"].fill_null(float("nan")).to_numpy()
    yield RowBlock(
        index=_numbers(table["index"]),
        label=_numbers(table["label"]),
        pred=pred,
        prob=prob,
        failed=table["error"].is_valid().to_numpy(),
        best=_best(table["topk_index"].combine_chunks(), pred) if best else None,
    )


def _numbers(column: Any) -> Numbers:
    return np.asarray(column.fill_null(-1).to_numpy(), dtype=np.int64)


def _best(column: Any, pred: Numbers) -> npt.NDArray[Any]:
    """Stack lists of one length, which error rows lack, into an array with -1 there."""
    filled = np.flatnonzero(pred >= 0)
    flat = column.flatten().to_numpy()
    best = np.full((len(pred), len(flat) // len(filled) if len(filled) else 1), -1, dtype=np.int64)
    if len(filled):
        best[filled] = flat.reshape(len(filled), -1)
    return best[:, :TOP]


def _read_array(
    run_dir: Path, manifest: Manifest, part: Part, samples: Samples | None, *, best: bool
) -> Iterator[RowBlock]:
    array = map_array(run_dir / ARRAY)
    failed: Sequence[int] = [int(index) for index in part.reasons]
    for first in range(part.first, part.stop, ARRAY_ROWS):
        stop = min(first + ARRAY_ROWS, part.stop)
        index = np.arange(first, stop)
        bad = np.isin(index, failed)
        label = [-1 if samples is None else samples.known_label(i) for i in index.tolist()]
        labels = np.array(label, dtype=np.int64)
        if not manifest.has_classes or manifest.fingerprint["output.fields"] == ["embedding"]:
            # Embeddings name no classes.
            unknown = np.full(len(index), np.nan, dtype=np.float32)
            nothing = np.full(len(index), -1)
            yield RowBlock(index=index, label=labels, pred=nothing, prob=unknown, failed=bad, best=None)
            continue
        logits = np.array(array[first - manifest.start : stop - manifest.start], dtype=np.float32)
        if logits.shape[1] == 1:
            # As `num_outcomes` says.
            logits = np.pad(logits, ((0, 0), (1, 0)))
        pred = logits.argmax(axis=1)
        top = logits[np.arange(len(index)), pred]
        wants_best = best and max(label) >= 0
        order = np.argpartition(-logits, TOP - 1, axis=1)[:, :TOP] if wants_best else None
        yield RowBlock(
            index=index,
            label=labels,
            pred=np.where(bad, -1, pred),
            prob=1 / np.exp(logits - top[:, None]).sum(axis=1),
            failed=bad,
            best=order,
        )
