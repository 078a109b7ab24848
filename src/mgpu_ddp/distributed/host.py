"""The host: which of its CPUs a GPU keeps busy, and how much of its memory is used and free.

While its JPEG engines are at work, a GPU interrupts one CPU 30,000 times a second. What runs there gets little done:
the thread that asks nvJPEG 17,000 images/s instead of 45,000, a loader's worker a tenth (H200, driver 580).
"""

import os
import time
from collections.abc import Set
from contextlib import suppress
from pathlib import Path

import torch

from mgpu_ddp.errors import OutOfMemoryError

NVIDIA = Path("/sys/bus/pci/drivers/nvidia")
FEW = 8
"""One CPU in so many may be left unused: more would cost more than they bring."""


def interrupted_cpus(driver: Path = NVIDIA) -> frozenset[int]:
    """Find the CPU that the first vector of each device of a driver interrupts, where the kernel tells.

    It is the first one that decoding keeps busy. Counts would not show it in time: before there is work, other vectors
    may have interrupted more often.

    Source: Linux, Documentation/ABI/testing/sysfs-bus-pci and core-api/irq/irq-affinity.rst.
    """
    cpus: set[int] = set()
    for device in driver.glob("*:*"):
        try:
            first = min(int(each.name) for each in (device / "msi_irqs").iterdir())
            cpus.add(int(Path(f"/proc/irq/{first}/effective_affinity_list").read_text()))
        except (OSError, ValueError):
            # A container may hide any of these, and a vector may interrupt several CPUs.
            continue
    return frozenset(cpus)


def keep_off(interrupted: Set[int], cpus: Set[int]) -> None:
    """Run this thread, and what it starts from now on, on `cpus` without the interrupted ones, if those are few."""
    left = cpus - interrupted
    os.sched_setaffinity(0, left if FEW * (len(cpus) - len(left)) <= len(cpus) else cpus)


def process_age_s() -> float:
    """Seconds since this process started. Source: proc(5), starttime in /proc/self/stat."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def peaks() -> dict[str, int]:
    """Return the most memory that this process has used since `reset_peaks`, on its GPU and on the host."""
    high = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    return {"peak_gpu_bytes": gpu, "peak_host_bytes": int(high) * 1024}


def reset_peaks() -> None:
    """Measure peaks of memory from now on. Source: proc(5), /proc/pid/clear_refs."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        # A sandbox may refuse it: then the host's peak is that of the whole process.
        Path("/proc/self/clear_refs").write_text("5")


def require_memory(key: str, value: object, num_bytes: int, available: int, remedy: str) -> None:
    """Refuse the value of a key that takes more memory than there is, before it is tried.

    Raises:
        OutOfMemoryError: says how much it takes.
    """
    if num_bytes > available:
        there = f"it takes {num_bytes / 2**30:,.1f} GiB of the {available / 2**30:,.1f} GiB there are for this process"
        raise OutOfMemoryError(f"{key} must fit into memory, got {value}: {there}. {remedy}")


def is_out_of_memory(error: Exception) -> bool:
    # On the CPU torch raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def available_bytes() -> int:
    """Return how much host memory is free. Source: proc(5), MemAvailable; the kernel's cgroup-v2, memory.max."""
    meminfo = Path("/proc/meminfo").read_text()
    available = int(meminfo.partition("MemAvailable:")[2].split()[0]) * 1024
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        left = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        # The page cache counts as used there, but is freed when needed.
        file = (group / "memory.stat").read_text().partition("inactive_file ")[2].split()[0]
        available = min(available, left + int(file))
    return available
