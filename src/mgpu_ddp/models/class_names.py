"""Names of a model's classes: read from a file, and their digest."""

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

from mgpu_ddp.config.checks import require
from mgpu_ddp.data.input_file import open_value
from mgpu_ddp.errors import UsageError, cause_of, plural

NAME_BYTES = 4096
"""A longer text is no name."""


def read_class_names(path: Path, num_classes: int) -> tuple[str, ...]:
    """The names in a file: one a line, or a JSON list.

    Raises:
        UsageError: the file cannot be read, or does not hold one name for each class.
    """
    key, remedy = "model.class_names", "Give one name a line, in the order of the model's classes."
    with open_value(key, path) as file:
        num_bytes, most_bytes = os.fstat(file.fileno()).st_size, num_classes * NAME_BYTES
        rule = f"a file of at most {most_bytes:,} bytes for {plural(num_classes, 'class')}"
        require(num_bytes <= most_bytes, key, rule, f"{num_bytes:,} in {str(path)!r}", remedy)
        data = io.BytesIO(file.read())
    try:
        text = io.TextIOWrapper(data, "utf-8-sig").read()
        names = json.loads(text) if path.suffix == ".json" else text.removesuffix("\n").split("\n")
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{key} must be a readable text in UTF-8, got {str(path)!r} ({cause_of(error)}). {remedy}"
        ) from None
    return check_names(key, names, num_classes, path, remedy)


def check_names(key: str, names: Any, num_classes: int, path: Path, remedy: str) -> tuple[str, ...]:
    """The names of all classes, without blanks around them.

    Raises:
        UsageError: they are something else.
    """
    ok = isinstance(names, list) and all(isinstance(name, str) for name in names)
    require(ok, key, "a list of names", str(path), remedy)
    found = f"{len(names)} in {str(path)!r}"
    require(len(names) == num_classes, key, f"a file of {plural(num_classes, 'name')} for this model", found, remedy)
    stripped = tuple(name.strip() for name in names)
    for number, name in enumerate(stripped):
        # JSON may spell a lone surrogate, which no table can hold.
        ok = bool(name) and name.isprintable()
        require(ok, key, "printable names", f"{name!r} for class {number}", remedy)
    return stripped


def names_digest(names: tuple[str, ...] | None) -> str:
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()
