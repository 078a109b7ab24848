"""Progress on stderr, tables on stdout."""

import sys
import time
from collections.abc import Sequence

QUIET_EVERY_S = 10.0


def say(text: str) -> None:
    """Print a line on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_columns(lines: Sequence[Sequence[object]]) -> None:
    """Print lines as columns: the first one to the left, all others to the right."""
    cells = [[str(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        aligned = (c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        print("  ".join(aligned).rstrip())


class Progress:
    """Done so far, rate and time left, on stderr: one line that is rewritten, or a line every 10 s into a pipe."""

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
        """Show how far it is, unless that was shown a moment ago."""
        now = time.monotonic()
        if not self._terminal and now - self._shown < QUIET_EVERY_S and done < self._total:
            return
        self._shown = now
        rate = done / self.elapsed_s
        left_s = min((self._total - done) / rate if rate else float("inf"), max(0.0, self._deadline - now))
        self._write(
            f"{done} of {self._total} {self._what}, {rate * 60:.1f}/min, {left_s:.0f} s left, {note}", stays=False
        )

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._write(text, stays=True)

    def end(self) -> None:
        """Remove the line that is rewritten."""
        self._write("", stays=False)

    def _write(self, text: str, *, stays: bool) -> None:
        if self._terminal:
            sys.stderr.write(f"\r\033[K{text}" + "\n" * stays)
        elif text:
            sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
