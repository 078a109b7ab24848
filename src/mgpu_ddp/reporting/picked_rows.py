"""The rows that a page shows: some evenly spread, and of each class the most and the least certain."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SPREAD = 24
EACH = 4
"""Rows of a class at either end."""
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowBlock:
    """Columns of consecutive rows, as far as they are counted.

    `index`, `label`, `pred`: int64 (n,), -1 where null. `prob`: float32 (n,), NaN where null. `failed`: bool (n,).
    `best`: the classes of the highest scores, (n, k), or None.
    """

    index: Numbers
    label: Numbers
    pred: Numbers
    prob: npt.NDArray[np.float32]
    failed: npt.NDArray[np.bool_]
    best: npt.NDArray[np.int64] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PickedRow:
    """One row for the page to show, which has a prediction."""

    index: int
    label: int
    """-1 without one."""
    pred: int
    """-1 where the model names no classes."""
    prob: float


class PickedRows:
    """Picks rows from blocks that come in dataset order. What it holds is bounded, whatever their number."""

    def __init__(self, start: int, stop: int, num_classes: int) -> None:
        """Pick from the rows [start, stop) of a model with so many classes, 0 for one that names none."""
        num_spread = min(SPREAD, stop - start)
        self._wanted = start + np.linspace(0, stop - start - 1, num_spread).astype(np.int64)
        self.spread: list[PickedRow] = []
        """Evenly spread; in the place of a row without a prediction the next one that has one."""
        self._most, self._least = (_Extremes(num_classes) for _ in range(2))

    def add(self, block: RowBlock) -> None:
        good = np.flatnonzero(~block.failed)
        wanted = self._wanted[(self._wanted >= block.index[0]) & (self._wanted <= block.index[-1])]
        places = np.unique(np.searchsorted(block.index[good], wanted))
        self.spread += [
            PickedRow(
                index=int(block.index[place]),
                label=int(block.label[place]),
                pred=int(block.pred[place]),
                prob=float(block.prob[place]),
            )
            for place in good[places[places < len(good)]].tolist()
        ]
        self._most.add(block, block.prob)
        self._least.add(block, -block.prob)

    def of_class(self, number: int) -> tuple[list[PickedRow], list[PickedRow]]:
        """The most certain rows of a class, the best first, and the least certain others, the worst first."""
        most = [
            PickedRow(index=index, label=label, pred=number, prob=score)
            for index, label, score in self._most.of_class(number)
        ]
        shown = {row.index for row in most}
        least = [
            PickedRow(index=index, label=label, pred=number, prob=-score)
            for index, label, score in self._least.of_class(number)
            if index not in shown
        ]
        return most, least


class _Extremes:
    """The rows of each class with the highest scores, of equal ones the first."""

    def __init__(self, num_classes: int) -> None:
        self._score = np.full((num_classes, EACH), -np.inf, np.float32)
        self._index, self._label = (np.full((num_classes, EACH), -1, np.int64) for _ in range(2))

    def add(self, block: RowBlock, score: npt.NDArray[np.float32]) -> None:
        rows = np.flatnonzero(block.pred >= 0)
        # Few rows of a block are better than those that are held by now.
        rows = rows[score[rows] > self._score[block.pred[rows], -1]]
        classes = np.unique(block.pred[rows])
        pred = np.concatenate([np.repeat(classes, EACH), block.pred[rows]])
        scores = np.concatenate([self._score[classes].reshape(-1), score[rows]])
        index = np.concatenate([self._index[classes].reshape(-1), block.index[rows]])
        label = np.concatenate([self._label[classes].reshape(-1), block.label[rows]])
        # Stable: those that are held, and those of lower index, come first.
        order = np.lexsort((-scores, pred))
        first = np.searchsorted(pred[order], classes)
        kept = order[first[:, None] + np.arange(EACH)]
        self._score[classes], self._index[classes], self._label[classes] = scores[kept], index[kept], label[kept]

    def of_class(self, number: int) -> Iterator[tuple[int, int, float]]:
        """(index, label, score), the highest first."""
        for index, label, score in zip(self._index[number], self._label[number], self._score[number], strict=True):
            if index >= 0:
                yield int(index), int(label), float(score)
