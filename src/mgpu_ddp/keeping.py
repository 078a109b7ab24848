"""What one job leaves to the next one of its process."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

Thing = TypeVar("Thing")


class Kept:
    """Things that were costly to make, each with what it depends on.

    All ranks must have the same or none: forget all once a job has failed, for it may have failed on one rank alone.
    """

    def __init__(self) -> None:
        self._things: dict[str, tuple[Any, int, Any]] = {}
        """By name: what it depends on, the number of the job that made it, and the thing."""
        self._jobs = 0
        self.began = 0.0
        """When the current job's start-up began, by `time.perf_counter`: for the first job, with the process."""
        self.reused: list[str] = []
        """Names of what the current job has from one before it."""

    def begin(self) -> None:
        """Another job begins."""
        self.began = time.perf_counter() - (0 if self._jobs else _process_age_s())
        self.reused = []
        self._jobs += 1
        reset_peaks()

    def get(self, name: str, depends_on: Any, make: Callable[[], Thing]) -> Thing:
        """The thing of this name that was made for the same, or a new one in its place."""
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


def _process_age_s() -> float:
    """Seconds since this process started. Source: proc(5), starttime in /proc/self/stat."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def peaks() -> dict[str, int]:
    """The most memory this process has used since `reset_peaks`: bytes on its GPU, and bytes of the host."""
    high = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    return {"peak_gpu_bytes": gpu, "peak_host_bytes": int(high) * 1024}


def reset_peaks() -> None:
    """Begin to measure memory anew. Source: proc(5), /proc/pid/clear_refs."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        # A sandbox may refuse it: then the host's peak is that of the whole process.
        Path("/proc/self/clear_refs").write_text("5")


def available_bytes() -> int:
    """Host memory that may still be used. Source: proc(5), MemAvailable; the kernel's cgroup-v2, memory.max."""
    meminfo = Path("/proc/meminfo").read_text()
    available = int(meminfo.partition("MemAvailable:")[2].split()[0]) * 1024
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        left = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        # The page cache counts as used there, but gives way.
        file = (group / "memory.stat").read_text().partition("inactive_file ")[2].split()[0]
        available = min(available, left + int(file))
    return available
