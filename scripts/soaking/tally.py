"""The counts of a soak, and how it ends."""

import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.showing import Progress, print_columns

from soaking.jobs import Difference


@dataclass(frozen=True, kw_only=True, slots=True)
class Soak:
    """One run of a mode: where it works, how long, and from which seed."""

    mode: str
    work: Path
    count: int
    seconds: float
    seed: int


@dataclass(kw_only=True)
class Tally:
    """Everything that was counted; threads may share it."""

    soak: Soak
    progress: Progress
    kills: Counter[tuple[str, ...]] = field(default_factory=Counter)
    """By phase, by victim, ...: one word for each column of the table."""
    attempts: int = 0
    differences: list[Difference] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Tables that differ, ranks that hang, commits that vanish, resumes that are refused."""
    slowest_s: dict[str, float] = field(default_factory=dict)
    """The longest that what is bounded took."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def killed(self) -> int:
        return self.kills.total()

    def begin(self) -> None:
        """Count an attempt."""
        with self._lock:
            self.attempts += 1

    def kill(self, *what: str) -> None:
        """Count a kill and show how far the soak is."""
        with self._lock:
            self.kills[what] += 1
            self.progress.show(self.killed, f"{len(self.differences)} tables compared")

    def took(self, what: str, seconds: float) -> None:
        """Note how long something took that must end in time."""
        with self._lock:
            self.slowest_s[what] = max(self.slowest_s.get(what, 0.0), round(seconds, 1))

    def compared(self, found: Difference, where: str) -> None:
        """Count a table that was compared."""
        with self._lock:
            self.differences.append(found)
        if not found.is_none:
            self.fail(f"{where}: {found}")

    def fail(self, text: str) -> None:
        """Note a failure and say it."""
        with self._lock:
            self.failures.append(text)
        self.progress.say(f"FAILED {text}")

    def report(self, *heads: str) -> bool:
        """Print the tables and the JSON line. True where nothing failed."""
        self.progress.end()
        totals = {name: sum(getattr(each, name) for each in self.differences)
                  for name in ("rows", "missing", "duplicates", "different")}  # fmt: skip
        empty = ("",) * (len(heads) - 1)
        kills = [(*what, times) for what, times in sorted(self.kills.items())]
        print_columns([(*heads, "times"), *kills, ("all", *empty, self.killed)])
        print()
        if self.slowest_s:
            print_columns([("the slowest", "s"), *sorted(self.slowest_s.items())])
            print()
        print_columns([("attempts", "tables", *totals, "failures"),
                       (self.attempts, len(self.differences), *totals.values(), len(self.failures))])  # fmt: skip
        said: dict[str, Any] = {
            "mode": self.soak.mode,
            "seed": self.soak.seed,
            "asked": self.soak.count,
            "kills": self.killed,
            "out_of_time": self.progress.out_of_time,
            "seconds": round(self.progress.elapsed_s, 1),
            "attempts": self.attempts,
            "tables": len(self.differences),
            **totals,
            "by": {", ".join(what): times for what, times in sorted(self.kills.items())},
            "slowest_s": self.slowest_s,
            "failures": self.failures,
        }
        print(json.dumps(said), flush=True)
        return not self.failures
