"""Opening the files that a user names."""

import errno
import io
import os
import stat

from mgpu_ddp.errors import UsageError, cause_of

AnyPath = str | bytes | os.PathLike[str]


def open_input(path: AnyPath) -> io.FileIO:
    """Open a regular file, unbuffered.

    Raises:
        OSError: it is missing, unreadable or no regular file.
    """
    return io.FileIO(open_descriptor(path))


def open_descriptor(path: AnyPath) -> int:
    """Open a regular file as `open_input` does. Opening or reading a FIFO or a device may block, or never end."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(file)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        # The files of /proc say that they are empty. Some of them block, or never end.
        if not stat.S_ISREG(status.st_mode) or (status.st_size == 0 and os.read(file, 1)):
            raise OSError(errno.EINVAL, "not a regular file")
    except BaseException:
        os.close(file)
        raise
    return file


def require_input(path: AnyPath) -> None:
    """Refuse what `open_input` does, for a library that opens the file itself."""
    os.close(open_descriptor(path))


def open_value(key: str, path: str | os.PathLike[str]) -> io.FileIO:
    """Open the file that is the value of a key.

    Raises:
        UsageError: it is missing, unreadable or no regular file.
    """
    try:
        return open_input(path)
    except OSError as error:
        raise UsageError(
            f"{key} must be a readable file, got {str(path)!r} ({cause_of(error)}). Check the path."
        ) from None
