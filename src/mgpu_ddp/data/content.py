"""Columns of a listing that tell whether a file still holds what it held: `data.check`."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from mgpu_ddp.data.input_file import open_input


def check_of(check: str, *, is_remote: bool) -> str:
    """`data.check` with auto decided."""
    return ("name" if is_remote else "stat") if check == "auto" else check


Status = tuple[int, int]
"""Size in bytes and modification time in ns, both -1 for a file that cannot be looked at."""


def as_columns(numbers: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Columns of a listing from (n, 2): the status of each file."""
    import pyarrow as pa

    return {
        name: pa.array(column, mask=numbers[:, 0] < 0)
        for name, column in (("bytes", numbers[:, 0]), ("modified_ns", numbers[:, 1]))
    }


def content_of(root: str, paths: Iterable[bytes], check: str) -> dict[str, Any]:
    """Columns of a listing that tell the content of files: by `stat`, or by `hash`, which reads all of them."""
    import pyarrow as pa

    full = (os.path.join(os.fsencode(root), path) for path in paths)
    if check == "stat":
        numbers = np.fromiter(chain.from_iterable(map(status_of, full)), np.int64)
        return as_columns(numbers.reshape(-1, 2))
    if check == "hash":
        with ThreadPoolExecutor() as pool:
            return {"sha256": pa.array(pool.map(_digest_of, full), type=pa.binary(32))}
    return {}


def status_of(path: bytes) -> Status:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _digest_of(path: bytes) -> bytes | None:
    try:
        with open_input(path) as file:
            return hashlib.file_digest(file, "sha256").digest()
    except (OSError, ValueError):
        return None
