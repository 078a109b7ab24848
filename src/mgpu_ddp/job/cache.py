"""A cache of what is costly to make, from one job to the next one of its process."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from mgpu_ddp.distributed.host import process_age_s, reset_peaks

Thing = TypeVar("Thing")


class Kept:
    """Things that were costly to make, each with what it depends on.

    All ranks must hold the same things: forget all after a failed job, which may have failed on one rank alone.
    """

    def __init__(self) -> None:
        self._things: dict[str, tuple[Any, int, Any]] = {}
        """By name: what it depends on, the number of the job that made it, and the thing."""
        self._jobs = 0
        self.began = 0.0
        """When the current job's start-up began, by `time.perf_counter`: for the first job, with the process."""
        self.reused: list[str] = []
        """Names of what the current job took over from an earlier one."""

    def begin(self) -> None:
        """Begin another job."""
        self.began = time.perf_counter() - (0 if self._jobs else process_age_s())
        self.reused = []
        self._jobs += 1
        reset_peaks()

    def get(self, name: str, depends_on: Any, make: Callable[[], Thing]) -> Thing:
        """Return the thing of this name if it depends on the same, else make it anew."""
        if name in self._things and self._things[name][0] == depends_on:
            if name not in self.reused and self._things[name][1] != self._jobs:
                self.reused.append(name)
        else:
            # First, so that the two are not in memory together.
            self._things.pop(name, None)
            self._things[name] = (depends_on, self._jobs, make())
        thing: Thing = self._things[name][2]
        return thing

    def forget(self) -> None:
        self._things.clear()
