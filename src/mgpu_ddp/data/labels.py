"""Labels as sources give them, numbers or names, and the numbers that stand for them in the table."""

import logging
from collections.abc import Sequence
from typing import Any

from mgpu_ddp.errors import UsageError

log = logging.getLogger("mgpu_ddp")

MOST_NAMES = 1_000_000
"""More different texts are captions or paths, not classes."""


def is_text(kind: Any) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def as_names(column: Any) -> Any:
    """Convert an Arrow column of text to names: large_string without blanks around them, null where nothing is left."""
    import pyarrow as pa
    from pyarrow import compute

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    names = compute.utf8_trim_whitespace(column.cast(pa.large_string()))
    return compute.if_else(compute.equal(names, ""), pa.scalar(None, pa.large_string()), names)


def number_names(names: Any, known: Sequence[str], what: str) -> tuple[Any, list[str]]:
    """Number names: those that are known as before, then the others, sorted.

    Returns int32 labels, and the names in the order of their numbers.

    Raises:
        UsageError: there are too many of them. The message begins with `what`.
    """
    import pyarrow as pa
    from pyarrow import compute

    found = compute.unique(names.drop_null())
    if len(found) > MOST_NAMES:
        raise UsageError(f"{what} holds {len(found):,} different texts, which are no classes. Leave the labels out.")
    vocabulary = [*known, *sorted(set(found.to_pylist()).difference(known))]
    return compute.index_in(names, value_set=pa.array(vocabulary, pa.large_string())), vocabulary


def as_labels(column: Any, what: str) -> Any:
    """Convert an Arrow column to class numbers, int32, null where they are null or negative.

    Raises:
        UsageError: they are not whole numbers, or too large. The message begins with `what`.
    """
    import pyarrow as pa
    from pyarrow import compute

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_floating(column.type):
        # pandas writes whole numbers as floats where some are missing.
        column = column.cast(pa.float64())
        column = compute.if_else(compute.is_nan(column), None, column)
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type) or pa.types.is_null(column.type)):
        raise UsageError(
            f"{what} holds {column.type}, not whole numbers or names. Number the classes, or leave the labels out."
        )
    try:
        labels = column.cast(pa.int32())
    except pa.ArrowInvalid as error:
        raise UsageError(f"{what} holds no class numbers: {error}. Number the classes from 0.") from None
    return compute.if_else(compute.less(labels, 0), pa.scalar(None, pa.int32()), labels)


def log_labels(images: int, labels: int, names: Sequence[str] | None) -> None:
    """Log how many images there are, how many of them have labels, and what these are called."""
    called = ""
    if names is not None:
        called = f" of {len(names):,} names ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
    log.info("%s images, %s labels%s", f"{images:,}", f"{labels:,}" if labels else "no", called)
