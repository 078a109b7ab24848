"""Predicted rows on their way from a rank to the table."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from mgpu_ddp.output.columns import Column, Values, join_columns


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """n rows as columns.

    `index`: int64 (n,). `label`: int32 (n,), -1 where unknown. `columns`: what became of the model's outputs, in the
    table's order; of a classifier `pred` int32 (n,), `prob` float32 (n,), `topk_index` int32 (n, k), `topk_prob`
    float32 (n, k) and any of `logits`, `probs`, `embedding` float32 or float16 (n, d). `errors`: dataset index →
    reason; such a row's columns hold nothing of meaning. `split`: indices of rows whose batch was split for lack of
    memory. `carried`: masked arrays (n, ...) that come with the samples; `path` among them is the rows' name.
    """

    index: npt.NDArray[np.int64]
    label: npt.NDArray[np.int32]
    columns: dict[str, Column]
    errors: dict[int, str]
    split: frozenset[int] = frozenset()
    carried: dict[str, Values] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def failed(self) -> npt.NDArray[np.bool_]:
        """bool (n,): the error rows."""
        if not self.errors:
            return np.zeros(len(self), dtype=np.bool_)
        return np.isin(self.index, np.fromiter(self.errors, dtype=np.int64))

    def take(self, which: Values) -> "Rows":
        """The rows that an integer or boolean array selects."""
        index = self.index[which]
        kept = frozenset(index.tolist()) if self.errors or self.split else frozenset()
        return Rows(
            index=index,
            label=self.label[which],
            columns={name: column[which] for name, column in self.columns.items()},
            errors={i: reason for i, reason in self.errors.items() if i in kept},
            split=self.split & kept,
            carried={name: column[which] for name, column in self.carried.items()},
        )

    def renumbered(self, numbers: npt.NDArray[np.int64]) -> "Rows":
        """The same rows with index numbers[i] in the place of i."""
        return replace(
            self,
            index=numbers[self.index],
            errors={int(numbers[i]): reason for i, reason in self.errors.items()},
            split=frozenset(int(numbers[i]) for i in self.split),
        )


def concatenate(chunks: Sequence[Rows]) -> Rows:
    """Join chunks; columns come from the chunks that hold rows."""
    filled = [chunk for chunk in chunks if len(chunk)] or list(chunks[:1])
    return Rows(
        index=np.concatenate([c.index for c in filled]),
        label=np.concatenate([c.label for c in filled]),
        columns={name: join_columns([c.columns[name] for c in filled]) for name in filled[0].columns},
        errors={i: reason for c in filled for i, reason in c.errors.items()},
        split=frozenset().union(*(c.split for c in filled)),
        carried={name: join_columns([c.carried[name] for c in filled]) for name in filled[0].carried},
    )


def in_order(chunks: Sequence[Rows], before: int) -> Rows:
    """Join chunks into dataset order, keeping the rows with an index below `before`."""
    joined = concatenate(chunks)
    order = np.argsort(joined.index, kind="stable")
    return joined.take(order[: int(np.searchsorted(joined.index[order], before))])
