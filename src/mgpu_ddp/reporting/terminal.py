"""stdout, stderr and the log as places to write to: none of them ever fails a job, and no text steers a terminal."""

import io
import locale
import logging
import os
import select
import sys
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

from mgpu_ddp.errors import printable


def make_output_safe() -> None:
    """Let stdout and stderr drop what they cannot take, and open those that were closed when the process started."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Or a file that is opened next gets the number, and what libraries print ends up in it.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            # A notebook or a test has put its own there.
            continue
        if stream is not None:
            stream.flush()
        file = _Output(number if stream is not None else os.open(os.devnull, os.O_WRONLY), "w", closefd=False)
        text = io.TextIOWrapper(
            io.BufferedWriter(file),
            encoding=stream.encoding if stream is not None else locale.getpreferredencoding(False),
            errors="backslashreplace",
            line_buffering=number == 2 or file.isatty(),
        )
        setattr(sys, name, text)


class _Output(io.FileIO):
    """A file whose writes do not fail: the reader of a pipe may have left, and a disk may be full."""

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:
                # Another program has made the terminal non-blocking.
                select.select([], [self], [])
        except OSError:
            return len(data)
        return written


class OneLine(logging.Formatter):
    """Formats a message as one line, whatever the names in it hold."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        record.message = printable(record.message)
        return super().formatMessage(record)


def print_lines(lines: Iterable[str]) -> None:
    """Print a table on stdout."""
    print("\n".join(map(printable, lines)), flush=True)


def print_mistake(error: object) -> None:
    """Print on stderr, in one line, what is wrong."""
    print(f"mgpu_ddp: {printable(str(error))}", file=sys.stderr, flush=True)


def print_next(outcome: Mapping[str, Any]) -> None:
    """Print on stderr the command that goes on after an outcome, if there is one."""
    if outcome.get("next"):
        why = "to retry the errors" if outcome["status"] == "complete" else "to continue"
        print(f"mgpu_ddp: {why}: {printable(outcome['next'])}", file=sys.stderr, flush=True)


def print_traceback(error: BaseException) -> None:
    lines = "".join(traceback.format_exception(error)).splitlines()
    print("\n".join(map(printable, lines)), file=sys.stderr, flush=True)
