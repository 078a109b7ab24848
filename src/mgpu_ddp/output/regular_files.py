"""Reading a run folder, which may be anybody's: regular files alone, of a bounded size, and through no link."""

import errno
import io
import json
import os
import stat
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mgpu_ddp.errors import UsageError

LARGEST_JSON = 256 << 20


def open_regular(path: Path) -> io.BufferedReader:
    """Open a file to read it.

    Raises:
        OSError: it is not there, or is a link, a pipe or anything else that is not a regular file.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for a writer.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.ELOOP, "it is a link", str(path)) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return os.fdopen(handle, "rb")


def read_json(path: Path, most: int = LARGEST_JSON) -> Any:
    """The value in a JSON file of at most so many bytes.

    Raises:
        OSError: it cannot be read, or is not a regular file.
        ValueError: it is not JSON, or too large.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"its {size} bytes are more than {most}")
        try:
            return json.loads(file.read().decode())
        except RecursionError:
            raise ValueError("it is nested too deeply") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a run folder; empty where there is no such file.

    Raises:
        UsageError: it is damaged.
    """
    try:
        return dict(read_json(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path} cannot be read ({type(error).__name__}). Start the job again.") from None


def map_array(path: Path, mode: Literal["r", "r+"] = "r") -> "np.memmap[Any, np.dtype[np.floating[Any]]]":
    """Map a `.npy` of float32 or float16, (rows, ...).

    Raises:
        OSError: it cannot be read, or is not a regular file.
        ValueError: it is no such array.
    """
    open_regular(path).close()
    try:
        array = np.lib.format.open_memmap(path, mode=mode)
    except (TypeError, ArithmeticError, MemoryError) as error:
        raise ValueError(str(error)) from None
    if array.ndim == 0 or array.dtype.str not in ("<f4", "<f2"):
        raise ValueError(f"it holds {array.dtype} of shape {array.shape}")
    return array
