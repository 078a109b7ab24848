"""What people see while a soak runs, and the table and the JSON line at its end."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

QUIET_EVERY_S = 10.0


class Progress:
    """Done of all, rate and time left, on stderr: one line that changes, or where that is piped, one now and then."""

    def __init__(self, what: str, total: int, limit_s: float) -> None:
        self._what, self._total = what, total
        self._terminal = sys.stderr.isatty()
        self._started = time.monotonic()
        self._deadline = self._started + limit_s
        self._shown = self._started

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() >= self._deadline

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def show(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if not self._terminal and now - self._shown < QUIET_EVERY_S and done < self._total:
            return
        self._shown = now
        rate = done / self.elapsed_s
        left_s = min((self._total - done) / rate if rate else float("inf"), max(0.0, self._deadline - now))
        per_minute = f"{rate * 60:.1f}/min"
        text = f"{done} of {self._total} {self._what}, {per_minute}, {left_s:.0f} s left{', ' if note else ''}{note}"
        self._write(f"\r\033[K{text}" if self._terminal else f"{text}\n")

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._write(f"\r\033[K{text}\n" if self._terminal else f"{text}\n")

    def end(self) -> None:
        if self._terminal:
            self._write("\r\033[K")

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under a head: the first column to the left, figures to the right."""
    lines = [[str(cell) for cell in line] for line in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        cells = (c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        print("  ".join(cells).rstrip())


def print_report(report: Mapping[str, Any]) -> None:
    """One JSON object on one line, last on stdout."""
    print(json.dumps(report), flush=True)
