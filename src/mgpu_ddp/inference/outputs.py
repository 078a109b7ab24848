"""A model's return value → the columns of rows, on the model's device.

Tensor (B, C)               logits: pred, prob, and the fields that were asked for; of (B, 1) by the sigmoid
dict of Tensors (B, ...)    a column each
list of B dicts of Tensors  a ragged column each, as torchvision's detectors return them
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mgpu_ddp.config.schema import OutputConfig, num_outcomes
from mgpu_ddp.errors import StateError
from mgpu_ddp.models.prepare import DTYPES
from mgpu_ddp.output.columns import OURS, Column, ColumnType, Ragged

RETURNS = (
    "a Tensor of logits (B, C), a dict of Tensors (B, ...), or a list of B dicts of Tensors, as torchvision's detectors"
    " return"
)
FINITE, SPLIT = " finite", " split"
"""Columns that say of each row whether its outputs are finite, and whether its batch was split for lack of memory.

No column of a user's begins with a space."""


class OutputsError(StateError):
    """A model returned what is no column."""


@dataclass(frozen=True, slots=True)
class RaggedTensor:
    """A column of rows of different length: `values` (entries of all rows, ...), and the entries of each row."""

    values: torch.Tensor
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: str, *, non_blocking: bool = False) -> "RaggedTensor":
        return RaggedTensor(self.values.to(device, non_blocking=non_blocking), self.lengths)


Columns = dict[str, Any]
"""Tensors (B, ...) and `RaggedTensor`s by name, with `FINITE`."""


def on_host(column: torch.Tensor | RaggedTensor, rows: int) -> Column:
    """Copy the first rows of a column that is on the host."""
    if isinstance(column, torch.Tensor):
        # Copies, so that rows do not keep the padded buffers alive.
        return np.array(column.numpy()[:rows])
    lengths = np.array(column.lengths[:rows], dtype=np.int64)
    return Ragged(values=np.array(column.values.numpy()[: lengths.sum()]), lengths=lengths)


def join(parts: Sequence[Columns]) -> Columns:
    """Append the columns of the halves of a batch."""
    joined: Columns = {}
    for name, first in parts[0].items():
        columns = [part[name] for part in parts]
        if isinstance(first, RaggedTensor):
            lengths = tuple(length for column in columns for length in column.lengths)
            joined[name] = RaggedTensor(torch.cat([column.values for column in columns]), lengths)
        else:
            joined[name] = torch.cat(columns)
    return joined


def to_columns(returned: Any, batch_size: int, config: OutputConfig, embedding: torch.Tensor | None = None) -> Columns:
    """Turn what forward returned for a batch into columns.

    `embedding` are the features (B, d) before the classifier, where they are asked for.

    Raises:
        OutputsError: it returned something else; says what.
    """
    if isinstance(returned, torch.Tensor):
        _check(returned.dim() == 2 and len(returned) == batch_size and returned.is_floating_point(), returned)
        return _classes(returned, config, embedding)
    if isinstance(returned, Mapping):
        _check(bool(returned), returned)
        return _fixed(returned, batch_size, config)
    _check(isinstance(returned, list | tuple) and len(returned) == batch_size, returned)
    _check(all(isinstance(row, Mapping) and row for row in returned), returned)
    return _ragged(returned, config)


def _classes(logits: torch.Tensor, config: OutputConfig, embedding: torch.Tensor | None) -> Columns:
    fields, logits = set(config.computed), logits.float()
    # By the sigmoid, which is the softmax over 0 and the logit.
    scores = torch.nn.functional.pad(logits, (1, 0)) if logits.shape[1] == 1 else logits
    probs = scores.softmax(dim=1)
    top = probs.topk(min(config.topk, probs.shape[1]), dim=1)
    columns = {"pred": top.indices[:, 0].int(), "prob": top.values[:, 0]}
    finite = logits.isfinite().all(dim=1)
    if "topk" in fields:
        columns |= {"topk_index": top.indices.int(), "topk_prob": top.values}
    for name, values in (("logits", logits), ("probs", probs), ("embedding", embedding)):
        if name in fields and values is not None:
            columns[name] = values.to(DTYPES[config.dtype])
            # Values too large for half precision become infinite.
            finite &= columns[name].isfinite().all(dim=1)
    return {**columns, FINITE: finite}


def types_of_classes(config: OutputConfig, num_classes: int, embedding_dim: int) -> tuple[ColumnType, ...]:
    """The types of the columns that become of logits."""
    outcomes = num_outcomes(num_classes)
    fields, topk = set(config.computed), min(config.topk, outcomes)
    wide = {"logits": num_classes, "probs": outcomes, "embedding": embedding_dim}
    dtype = str(DTYPES[config.dtype]).removeprefix("torch.")
    types = [ColumnType(name="pred", dtype="int32"), ColumnType(name="prob", dtype="float32")]
    if "topk" in fields:
        types.append(ColumnType(name="topk_index", dtype="int32", shape=(topk,)))
        types.append(ColumnType(name="topk_prob", dtype="float32", shape=(topk,)))
    types += [ColumnType(name=name, dtype=dtype, shape=(width,)) for name, width in wide.items() if name in fields]
    return tuple(types)


def _fixed(returned: Mapping[Any, Any], batch_size: int, config: OutputConfig) -> Columns:
    columns: Columns = {}
    finite: torch.Tensor | None = None
    for name, value in returned.items():
        _check_name(name)
        _check(isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == batch_size, {name: value})
        columns[name] = column = _of_dtype(name, value, config)
        ok = _all_finite(column)
        finite = ok if finite is None else finite & ok
    return {**columns, FINITE: finite}


def _ragged(returned: Sequence[Mapping[Any, Any]], config: OutputConfig) -> Columns:
    columns: Columns = {}
    finite: torch.Tensor | None = None
    if other := next((row for row in returned if row.keys() != returned[0].keys()), None):
        raise OutputsError(f"the dicts of a list must have the same names, got {[*returned[0]]} and {[*other]}")
    for name in returned[0]:
        _check_name(name)
        tensors = [row[name] for row in returned]
        for value in tensors:
            if not isinstance(value, torch.Tensor) or value.dim() == 0:
                raise OutputsError(f"{name} must be a Tensor (k, ...) in each dict of a list, got {_words(value)}")
        kinds = {(value.dtype, value.shape[1:]) for value in tensors}
        if len(kinds) > 1:
            raise OutputsError(f"{name} must have one dtype and shape in all rows, got {_words(tensors[:4])}")
        lengths = tuple(len(value) for value in tensors)
        entries = _of_dtype(name, torch.cat(tensors), config)
        columns[name] = RaggedTensor(entries, lengths)
        bad = ~_all_finite(entries)
        ends = torch.tensor(lengths, device=bad.device).cumsum(0)
        counts = torch.nn.functional.pad(bad.cumsum(0), (1, 0))
        ok = counts[ends] == torch.nn.functional.pad(counts[ends], (1, 0))[:-1]
        finite = ok if finite is None else finite & ok
    return {**columns, FINITE: finite}


def _all_finite(column: torch.Tensor) -> torch.Tensor:
    """bool (n,): the entries without NaN and Inf."""
    return column.isfinite().flatten(1).all(dim=1) if column.dim() > 1 else column.isfinite()


def _of_dtype(name: str, value: torch.Tensor, config: OutputConfig) -> torch.Tensor:
    if value.is_complex() or value.is_quantized or value.layout is not torch.strided:
        raise OutputsError(f"{name} must be a dense Tensor of numbers, got {value.dtype} {value.layout}")
    return value.to(DTYPES[config.dtype]) if value.is_floating_point() else value


def _check_name(name: Any) -> None:
    ok = isinstance(name, str) and name.isprintable() and name == name.strip() and name not in OURS
    if not (ok and name):
        raise OutputsError(f"a column's name must be text other than {', '.join(OURS)}, got {name!r}")


def _check(ok: bool, returned: Any) -> None:
    if not ok:
        raise OutputsError(f"forward, or outputs, must return {RETURNS}, got {_words(returned)}")


def _words(value: Any) -> str:
    """A value in a few words: types and shapes."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} Tensor {tuple(value.shape)}"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{key!r}: {_words(each)}" for key, each in [*value.items()][:4])
        return f"{type(value).__name__} {{{inner}{', ...' if len(value) > 4 else ''}}}"
    if isinstance(value, list | tuple):
        inner = ", ".join(_words(each) for each in value[:2])
        return f"{type(value).__name__} of {len(value)} [{inner}{', ...' if len(value) > 2 else ''}]"
    return type(value).__name__
