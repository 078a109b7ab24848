"""Keeping off the CPUs that GPUs interrupt.

While its JPEG engines are at work, a GPU interrupts one CPU 30,000 times a second. What runs there gets little done:
the thread that asks nvJPEG 17,000 images/s instead of 45,000, a loader's worker a tenth (H200, driver 580).
"""

import os
from collections.abc import Set
from pathlib import Path

NVIDIA = Path("/sys/bus/pci/drivers/nvidia")
FEW = 8
"""One CPU in so many may be left alone: to go without more would cost more than it brings."""


def interrupted_cpus(driver: Path = NVIDIA) -> frozenset[int]:
    """The CPU that each device of a driver interrupts most, where the kernel tells.

    Source: Documentation/ABI of Linux, sysfs-bus-pci and sysfs-kernel-irq; core-api/irq/irq-affinity.rst.
    """
    cpus: set[int] = set()
    for device in driver.glob("*:*"):
        try:
            numbers = [each.name for each in (device / "msi_irqs").iterdir()]
            busiest = max(numbers, key=lambda number: sum(map(int, _read(f"/sys/kernel/irq/{number}/per_cpu_count"))))
            cpus.update(map(int, _read(f"/proc/irq/{busiest}/effective_affinity_list")))
        except (OSError, ValueError):
            # A container may hide any of these, and what is no single CPU is none to keep off.
            continue
    return frozenset(cpus)


def _read(path: str) -> list[str]:
    return Path(path).read_text().strip().split(",")


def keep_off(interrupted: Set[int], cpus: Set[int]) -> None:
    """Run this thread, and what it starts from now on, on `cpus` without the interrupted ones, if those are few."""
    left = cpus - interrupted
    os.sched_setaffinity(0, left if FEW * (len(cpus) - len(left)) <= len(cpus) else cpus)
