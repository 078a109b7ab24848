"""The CPUs that devices interrupt, threads that keep off them, and peaks of memory, on this machine."""

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mgpu_ddp.distributed.host import FEW, available_bytes, interrupted_cpus, keep_off, peaks, reset_peaks

DEVICES = [device for device in Path("/sys/bus/pci/devices").iterdir() if any(device.glob("msi_irqs/*"))]


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_a_device_names_the_cpu_that_its_first_vector_interrupts(device: Path, tmp_path: Path) -> None:
    named = rf"^ *(\d+):.*MSIX-{device.name} +0-edge"
    (first,) = re.findall(named, Path("/proc/interrupts").read_text(), re.MULTILINE)
    (tmp_path / device.name).symlink_to(device)
    assert interrupted_cpus(tmp_path) == {int(Path(f"/proc/irq/{first}/effective_affinity_list").read_text())}


def test_where_there_is_no_such_device_no_cpu_is_named() -> None:
    assert interrupted_cpus(Path("/sys/bus/pci/drivers/none")) == frozenset()


@pytest.fixture
def own() -> Iterator[set[int]]:
    """The CPUs of this thread, which has them again afterwards."""
    before = os.sched_getaffinity(0)
    yield before
    os.sched_setaffinity(0, before)


@pytest.mark.parametrize("others", [FEW - 2, FEW - 1, FEW])
def test_threads_keep_off_interrupted_cpus_where_enough_are_left(own: set[int], others: int) -> None:
    one, *more = own
    # CPUs that this machine does not have count, and the kernel leaves them out.
    absent = {max(own) + 1 + number for number in range(others - len(more))}
    keep_off({one}, own | absent)
    with ThreadPoolExecutor(1) as pool:
        seen = pool.submit(os.sched_getaffinity, 0).result()
    if others >= FEW - 1:
        assert seen == set(more)
    else:
        assert seen == own
    keep_off(frozenset(), own)
    assert os.sched_getaffinity(0) == own


def test_each_job_has_its_own_peak_of_memory() -> None:
    reset_peaks()
    before = peaks()["peak_host_bytes"]
    filled = torch.ones(64 << 20, dtype=torch.uint8)
    with_it = peaks()["peak_host_bytes"]
    assert with_it - before > 0.9 * filled.numel()
    del filled
    reset_peaks()
    assert peaks()["peak_host_bytes"] < with_it - (32 << 20)
    assert 0 < available_bytes() < 2**50
