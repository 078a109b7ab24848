"""Files that are there whole and durable, or not at all, whenever the machine stops."""

import json
import os
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp")
"""A hidden file that is to become the one it names."""


def create_file(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Make a new file.

    Raises:
        FileExistsError: the name is taken; what has it stays as it is.
    """
    temporary = _filled(path, fill)
    try:
        # A link, unlike a rename, never replaces anything: a writer that wakes up late cannot undo another's work.
        os.link(temporary, path)
    finally:
        os.unlink(temporary)
    sync_folder(path.parent)


def replace_file(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Make or replace a file: its old or its new content is there at any moment, never a mixture."""
    os.replace(_filled(path, fill), path)
    sync_folder(path.parent)


def replace_bytes(path: Path, data: Any) -> None:
    replace_file(path, lambda file: file.write(data))


def replace_json(path: Path, value: Any) -> None:
    replace_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def _filled(path: Path, fill: Callable[[BinaryIO], object]) -> Path:
    """A hidden file beside the path, durable under a name that says it counts for nothing."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def add_folder(folder: Path) -> None:
    """Make a folder whose name is durable: what is durable in it would be lost with its name."""
    folder.mkdir(exist_ok=True)
    # One may be allowed to write to a folder and not to read it, and then it cannot be opened for this.
    with suppress(PermissionError):
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
