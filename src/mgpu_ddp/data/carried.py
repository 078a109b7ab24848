"""Columns of a list or of Parquet files that are copied into the rows as they are: `data.carry`."""

import base64
from collections.abc import Sequence
from typing import Any

from mgpu_ddp.errors import UsageError


def to_text(schema: Any) -> str:
    """An Arrow schema as JSON can hold it."""
    return base64.b64encode(schema.serialize()).decode()


def from_text(text: str | bytes) -> Any:
    """The schema that `to_text` wrote; an empty one of no text.

    Raises:
        ValueError: it is none.
    """
    import pyarrow as pa

    if not text:
        return pa.schema([])
    try:
        return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text, validate=True)))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"it holds no types of columns ({error})") from None


def find_columns(given: Sequence[str], carry: Sequence[str], where: str) -> list[str]:
    """The columns of a file that `data.carry` names, which may have blanks around them.

    Raises:
        UsageError: one is missing or there twice. `where` is the file.
    """
    found = []
    for name in carry:
        same = [each for each in given if each == name] or [each for each in given if each.strip() == name]
        if len(same) != 1:
            why = "is there twice" if same else f"is not among {', '.join(map(repr, given))}"
            raise UsageError(f"data.carry: the column {name!r} of {where} {why}. Correct data.carry, or the file.")
        found += same
    return found
