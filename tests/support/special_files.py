"""Paths that lead to no regular file."""

import os
from pathlib import Path

SPECIAL = {
    "fifo": "not a regular file",
    "device": "not a regular file",
    "proc": "not a regular file",
    "folder": "Is a directory",
    "missing": "No such file or directory",
}
"""The kinds, and why each cannot be read."""


def special_file(kind: str, path: Path) -> Path:
    """Put a file of some kind at a path."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        # What blocks or never ends differs by machine; all files of /proc say that they are empty.
        path.symlink_to({"device": "/dev/zero", "proc": "/proc/self/status"}[kind])
    return path
