"""What the rows of a table say together: classes, confidence, accuracy. Read back from the committed parts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mgpu_ddp.data.samples import Samples
from mgpu_ddp.output.formats import FORMATS
from mgpu_ddp.output.manifest import ARRAY, Manifest, Part
from mgpu_ddp.reporting.class_table import Classes

BINS = 20
TOP = 5
ARRAY_ROWS = 4096
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """Rows of a part, as far as they are counted.

    `index`, `label`, `pred`: int64 (n,), -1 where null. `prob`: float32 (n,), NaN where null. `best`: (n, k), or None.
    """

    index: Numbers
    label: Numbers
    pred: Numbers
    prob: npt.NDArray[np.float32]
    best: npt.NDArray[Any] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Picked:
    """One row that is shown."""

    index: int
    label: int
    pred: int
    """-1 where it is an error row."""
    prob: float


@dataclass(kw_only=True, slots=True)
class Tally:
    """Counts over all rows."""

    preds: Numbers
    """Rows of each predicted class."""
    confidence: Numbers
    """Rows by `prob`, in `BINS` of equal width from 0 to 1."""
    labelled: int
    """Rows with a label and a prediction."""
    how: str
    """What accuracy compares, or why it cannot."""
    compared: Numbers | None
    """Rows of each label, of those that are compared; None where labels mean no class."""
    top1: Numbers
    top5: Numbers | None
    """None where rows name fewer than five classes."""
    picked: list[Picked]

    @property
    def accuracy(self) -> dict[str, Any] | None:
        """Shares of rows whose label is their prediction, or among their five best; None where nothing is labelled."""
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

    def per_class(self, classes: Classes) -> list[dict[str, Any]]:
        """One row for each label that was compared."""
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


def tally(
    run_dir: Path, manifest: Manifest, classes: Classes, samples: Samples | None, *, num_picked: int = 0
) -> Tally:
    """Count all rows that the manifest lists. `samples` know the labels of an array. Rank 0 only."""
    job = manifest.fingerprint
    class_of, how = classes.compare()
    in_reach = min(TOP, classes.num_classes)
    logits = job["output.format"] == "npy" and job["output.fields"] != ["embedding"]
    has_top = logits or ("topk" in job["output.fields"] and job["output.topk"] >= in_reach)
    labels = 0 if class_of is None else len(class_of)
    found = Tally(
        preds=np.zeros(classes.num_classes, np.int64),
        confidence=np.zeros(BINS, np.int64),
        labelled=0,
        how=how,
        compared=None if class_of is None else np.zeros(labels, np.int64),
        top1=np.zeros(labels, np.int64),
        top5=np.zeros(labels, np.int64) if has_top else None,
        picked=[],
    )
    rows = manifest.prefix - manifest.start
    wanted = manifest.start + np.unique(np.linspace(0, rows - 1, num_picked).astype(np.int64)) if rows else np.zeros(0)
    for part in manifest.parts:
        for seen in _read(run_dir, manifest, part, samples, best=has_top and class_of is not None):
            _count(found, seen, class_of)
            for place in np.flatnonzero(np.isin(seen.index, wanted)).tolist():
                found.picked.append(
                    Picked(
                        index=int(seen.index[place]),
                        label=int(seen.label[place]),
                        pred=int(seen.pred[place]),
                        prob=float(seen.prob[place]),
                    )
                )
    return found


def _count(found: Tally, seen: Seen, class_of: Numbers | None) -> None:
    good = seen.pred >= 0
    found.preds += np.bincount(seen.pred[good], minlength=len(found.preds))
    found.confidence += np.bincount((seen.prob[good] * BINS).astype(np.int64).clip(0, BINS - 1), minlength=BINS)
    labelled = good & (seen.label >= 0)
    found.labelled += int(labelled.sum())
    if class_of is None or found.compared is None:
        return
    known = labelled & (seen.label < len(class_of))
    truth = np.where(known, class_of[np.where(known, seen.label, 0)], -1)
    known &= truth >= 0
    right = known & (seen.pred == truth)
    found.compared += np.bincount(seen.label[known], minlength=len(class_of))
    found.top1 += np.bincount(seen.label[right], minlength=len(class_of))
    if found.top5 is not None and seen.best is not None:
        near = known & (seen.best == truth[:, None]).any(axis=1)
        found.top5 += np.bincount(seen.label[near], minlength=len(class_of))


def _read(run_dir: Path, manifest: Manifest, part: Part, samples: Samples | None, *, best: bool) -> Iterator[Seen]:
    if part.file == ARRAY:
        yield from _read_array(run_dir, manifest, part, samples, best=best)
        return
    names = ["index", "label", "pred", "prob", *(["topk_index"] if best else [])]
    table = FORMATS[manifest.fingerprint["output.format"]].columns(run_dir / part.file, names)
    pred = _numbers(table["pred"])
    yield Seen(
        index=_numbers(table["index"]),
        label=_numbers(table["label"]),
        pred=pred,
        prob=table["prob"].fill_null(float("nan")).to_numpy(),
        best=_best(table["topk_index"].combine_chunks(), pred) if best else None,
    )


def _numbers(column: Any) -> Numbers:
    return np.asarray(column.fill_null(-1).to_numpy(), dtype=np.int64)


def _best(column: Any, pred: Numbers) -> npt.NDArray[Any]:
    """Lists of one length, absent in error rows, as an array of -1 there."""
    filled = np.flatnonzero(pred >= 0)
    flat = column.flatten().to_numpy()
    best = np.full((len(pred), len(flat) // len(filled) if len(filled) else 1), -1, dtype=np.int64)
    if len(filled):
        best[filled] = flat.reshape(len(filled), -1)
    return best[:, :TOP]


def _read_array(
    run_dir: Path, manifest: Manifest, part: Part, samples: Samples | None, *, best: bool
) -> Iterator[Seen]:
    array = np.load(run_dir / ARRAY, mmap_mode="r")
    failed: Sequence[int] = [int(index) for index in part.reasons]
    for first in range(part.first, part.stop, ARRAY_ROWS):
        stop = min(first + ARRAY_ROWS, part.stop)
        index = np.arange(first, stop)
        logits = np.array(array[first - manifest.start : stop - manifest.start], dtype=np.float32)
        label = [-1 if samples is None else samples.known_label(i) for i in index.tolist()]
        labels = np.array(label, dtype=np.int64)
        if manifest.fingerprint["output.fields"] == ["embedding"]:
            # They say nothing of classes.
            unknown = np.full(len(index), np.nan, dtype=np.float32)
            yield Seen(index=index, label=labels, pred=np.full(len(index), -1), prob=unknown, best=None)
            continue
        bad = np.isin(index, failed)
        pred = logits.argmax(axis=1)
        top = logits[np.arange(len(index)), pred]
        reach = min(TOP, logits.shape[1])
        wants_best = best and max(label) >= 0
        order = np.argpartition(-logits, reach - 1, axis=1)[:, :reach] if wants_best else None
        yield Seen(
            index=index,
            label=labels,
            pred=np.where(bad, -1, pred),
            prob=1 / np.exp(logits - top[:, None]).sum(axis=1),
            best=order,
        )
