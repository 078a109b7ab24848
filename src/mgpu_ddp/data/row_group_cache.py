"""Row groups of images in memory that all loader workers of a rank share."""

import fcntl
import mmap
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from mgpu_ddp.data import shared_memory

SHARED_BYTES = 1 << 30
"""Address space for all slots; memory is taken for what is in use."""
MOST_SLOTS = 256


class RowGroupCache:
    """Row groups in slots that are used again: one that any worker has read is read by no other.

    A slot holds where its images end, int64 (rows,), which of them are null, uint8 (rows,), then their bytes.
    """

    def __init__(self, largest_bytes: int) -> None:
        self._slot_bytes = -(-largest_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._slots = min(MOST_SLOTS, SHARED_BYTES // max(self._slot_bytes, 1))
        self._memory = np.frombuffer(shared_memory.allocate(self._slots * self._slot_bytes), np.uint8)
        self._heads = np.frombuffer(shared_memory.allocate(max(self._slots, 1) * 16), np.int64).reshape(-1, 2)
        """The row group in each slot, -1 for none, and the number of its rows."""
        self._heads[:] = -1
        self._locks = os.memfd_create("row groups")
        """An empty file, of which a worker locks the byte that has the number of its slot."""
        weakref.finalize(self, os.close, self._locks)
        self._own: tuple[int, Any] = (-1, None)
        """A row group that fits into no slot, kept by this worker alone."""

    def get(self, group: int, row: int, read: Callable[[], Any]) -> bytes | None:
        """One image of a row group, None where it is null; `read` returns the group's images where no slot has them."""
        if not self._slots:
            return self._own_image(group, row, read)
        slot = group % self._slots
        with self._held(slot):
            is_there = self._heads[slot, 0] == group
            if not is_there and (self._own[0] == group or not self._fill(slot, group, read)):
                return self._own_image(group, row, read)
            view = self._memory[slot * self._slot_bytes : (slot + 1) * self._slot_bytes]
            rows = int(self._heads[slot, 1])
            ends = view[: 8 * rows].view(np.int64)
            if view[8 * rows + row]:
                return None
            first = 9 * rows
            return view[first + (ends[row - 1] if row else 0) : first + ends[row]].tobytes()

    @contextmanager
    def _held(self, slot: int) -> Iterator[None]:
        """Keep other workers off a slot. The kernel lets go of it when this process is killed."""
        # The time limit of a sample stands still: that another worker reads, or hangs, is no fault of this one.
        left_s, _ = signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX, 1, slot)
            signal.setitimer(signal.ITIMER_REAL, left_s)
            yield
        finally:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, slot)

    def _fill(self, slot: int, group: int, read: Callable[[], Any]) -> bool:
        """Put a row group into a slot; False where it is too large, as one with repeated images may be."""
        images = read()
        rows = len(images)
        ends, data = _ends_and_bytes(images)
        if 9 * rows + len(data) > self._slot_bytes:
            self._own = (group, images)
            return False
        self._heads[slot, 0] = -1
        view = self._memory[slot * self._slot_bytes : (slot + 1) * self._slot_bytes]
        view[: 8 * rows].view(np.int64)[:] = ends
        view[8 * rows : 9 * rows] = np.asarray(images.is_null(), dtype=np.uint8)
        view[9 * rows : 9 * rows + len(data)] = data
        self._heads[slot, 1] = rows
        # Last: this worker may be killed at any time.
        self._heads[slot, 0] = group
        return True

    def _own_image(self, group: int, row: int, read: Callable[[], Any]) -> bytes | None:
        if self._own[0] != group:
            self._own = (group, read())
        image: bytes | None = self._own[1][row].as_py()
        return image


def slot_bytes(image_bytes: int, rows: int) -> int:
    """The room that a row group takes in a slot."""
    return image_bytes + 9 * rows


def _ends_and_bytes(images: Any) -> tuple[Any, Any]:
    """Where each of an Arrow array of images ends, counted from the first, and the bytes of all."""
    import pyarrow as pa

    wide = pa.types.is_large_binary(images.type)
    ends = np.frombuffer(images.buffers()[1], np.int64 if wide else np.int32)[images.offset :][: len(images) + 1]
    data = np.frombuffer(images.buffers()[2] or b"", np.uint8)[ends[0] : ends[-1]]
    return ends[1:] - ends[0], data
