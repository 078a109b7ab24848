"""The columns that become of a model's outputs: names, dtypes and shapes, agreed on before the first row is written."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mgpu_ddp.data.carried import from_text, to_text

Values = npt.NDArray[np.generic]
OURS = ("index", "path", "label", "pred", "prob", "pred_name", "topk_index", "topk_prob", "error")
"""Columns that this package writes itself, which no output of a user's model may be named."""
WIDE = ("logits", "probs", "embedding", "box", "width", "height")
"""Columns that it writes where `output.fields` or the data ask for them."""
RAGGED_ROWS = 100
"""Entries that a ragged row is assumed to have where its size only sizes buffers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ragged:
    """A column of n rows of different length, one row's entries after the other's."""

    values: Values
    """(entries of all rows, ...)."""
    lengths: npt.NDArray[np.int64]
    """int64 (n,): entries of each row."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.values.dtype

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """int64 (n + 1,): row i has the entries [offsets[i], offsets[i + 1])."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    def __getitem__(self, which: Any) -> "Ragged":
        """The rows that a slice, an integer or a boolean array selects."""
        rows, offsets = np.arange(len(self))[which], self.offsets
        lengths = self.lengths[rows]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return Ragged(values=self.values[np.repeat(offsets[rows], lengths) + within], lengths=lengths)


Column = Values | Ragged


def join_columns(parts: Sequence[Any]) -> Any:
    """Append columns of one kind; masked arrays stay masked."""
    if isinstance(parts[0], Ragged):
        return Ragged(
            values=np.concatenate([part.values for part in parts]),
            lengths=np.concatenate([part.lengths for part in parts]),
        )
    return (np.ma if isinstance(parts[0], np.ma.MaskedArray) else np).concatenate(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnType:
    """The name of a column and the type of its rows."""

    name: str
    dtype: str
    """By numpy's name: float32, int64, bool; object is text."""
    shape: tuple[int, ...] = ()
    """Of a row, or of each entry of a ragged row."""
    ragged: bool = False
    arrow: str = ""
    """The Arrow type of a column that `data.carry` copies: a schema of one field, as text."""

    @classmethod
    def carried(cls, name: str, kind: Any) -> "ColumnType":
        """The type of a column of an Arrow type."""
        import pyarrow as pa

        return cls(name=name, dtype=str(kind), arrow=to_text(pa.schema([pa.field("", kind)])))

    @property
    def arrow_type(self) -> Any:
        return from_text(self.arrow).field(0).type

    @classmethod
    def of(cls, name: str, column: Column) -> "ColumnType":
        ragged = isinstance(column, Ragged)
        values = column.values if isinstance(column, Ragged) else column
        return cls(name=name, dtype=str(values.dtype), shape=tuple(values.shape[1:]), ragged=ragged)

    @classmethod
    def read(cls, values: dict[str, Any]) -> "ColumnType":
        """The type that `asdict` made JSON values of."""
        return cls(**{**values, "shape": tuple(values["shape"])})

    def empty(self) -> Column:
        """A column of no rows."""
        values = np.empty((0, *self.shape), self.dtype)
        return Ragged(values=values, lengths=np.empty(0, np.int64)) if self.ragged else values

    @property
    def num_bytes(self) -> int:
        """About how many bytes a row takes."""
        itemsize = 16 if self.dtype == "object" else np.dtype(self.dtype).itemsize
        return itemsize * math.prod(self.shape) * (RAGGED_ROWS if self.ragged else 1)

    def __str__(self) -> str:
        if self.arrow:
            return f"{self.name} {self.dtype}"
        shape = ["k", *map(str, self.shape)] if self.ragged else [*map(str, self.shape)]
        return f"{self.name} {self.dtype} ({', '.join(shape)}{',' if len(shape) == 1 else ''})"


BOX = ColumnType(name="box", dtype="float64", shape=(4,))
"""The column of the boxes that samples are."""


def as_json(types: Sequence[ColumnType]) -> list[dict[str, Any]]:
    """Types as JSON values, for the manifest."""
    found = [{**asdict(each), "shape": list(each.shape)} for each in types]
    return [{key: value for key, value in each.items() if key != "arrow" or value} for each in found]


def carried_names(carry: Sequence[str], types: Sequence[ColumnType]) -> dict[str, str]:
    """What the columns that `data.carry` names are called in the table, beside a model's columns of these types."""
    taken = {*OURS, *WIDE, *(each.name for each in types)}
    names: dict[str, str] = {}
    for name in carry:
        column = name
        while column in taken or column.startswith("topk_") or (column != name and column in carry):
            column = f"source_{column}"
        names[name] = column
    return names
