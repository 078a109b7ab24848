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
    """The CPU that the first vector of each device of a driver interrupts, where the kernel tells.

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
            # A container may hide any of these, and what is no single CPU is none to keep off.
            continue
    return frozenset(cpus)


def keep_off(interrupted: Set[int], cpus: Set[int]) -> None:
    """Run this thread, and what it starts from now on, on `cpus` without the interrupted ones, if those are few."""
    left = cpus - interrupted
    os.sched_setaffinity(0, left if FEW * (len(cpus) - len(left)) <= len(cpus) else cpus)
