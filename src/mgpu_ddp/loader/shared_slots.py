"""Memory that loader workers fill and their rank reads, in slots that are used again and again.

A batch in new memory would cost a shared-memory file, page faults for every byte and a copy into pinned memory. The
slots are made once, before the workers fork, and pinned once, in the background while the first batches are made.
"""

import mmap
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from mgpu_ddp.data import shared_memory
from mgpu_ddp.preprocess.transform import Pixels

ENCODED_BYTES = 3 << 29
"""Encoded images of all slots of a rank together: a worker ends its piece when its slot has its share of them."""
ROOM_BYTES = 128 << 20
"""A slot's room for encoded images: more than its share, because the last image of a piece may be large. Pages that are
never written to take no memory."""
PINNING_THREADS = 4
"""One thread takes longer to touch pages for the first time than the model takes for the images on them."""


class SharedSlots:
    """Slots of one batch or piece each: its pixels (rows, *shape) of `dtype`, and room for encoded images.

    Where `planar`, the channels of an image, (height, width, 3), lie apart in memory. There is room for encoded images
    only where `packed`.
    """

    def __init__(
        self,
        count: int,
        rows: int,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype = torch.uint8,
        planar: bool = False,
        packed: bool = False,
    ) -> None:
        self._shape = (rows, shape[-1], *shape[:-1]) if planar else (rows, *shape)
        self._planar, self._dtype = planar, dtype
        self._view_bytes = int(np.prod(self._shape)) * dtype.itemsize
        self._pixel_bytes = _whole_pages(self._view_bytes)
        self._room = _whole_pages(ROOM_BYTES) if packed else 0
        self.share = ENCODED_BYTES // count
        """Bytes of encoded images that end a slot's piece."""
        self._slot_bytes = self._pixel_bytes + self._room
        self._map = shared_memory.allocate(count * self._slot_bytes)
        self._memory = torch.frombuffer(self._map, dtype=torch.uint8)
        self._grown = np.frombuffer(shared_memory.allocate(count), dtype=np.bool_)
        """Slots that hold more memory than they may keep."""
        self._count = count
        self._pinned: list[Future[None]] = []

    def pin(self) -> None:
        """Start to pin the pixels of all slots, in the background. Workers must have been forked before."""
        register = torch.cuda.cudart().cudaHostRegister

        def pin(slot: int) -> None:
            first = slot * self._slot_bytes
            # Touched first, because the driver would do so nine times slower, and block the model meanwhile.
            self._memory[first : first + self._pixel_bytes : mmap.PAGESIZE].sum()
            _check(register(self._view(slot).data_ptr(), self._pixel_bytes, 0))

        threads = ThreadPoolExecutor(PINNING_THREADS)
        self._pinned = [threads.submit(pin, slot) for slot in range(self._count)]
        threads.shutdown(wait=False)

    def pixels(self, slot: int) -> torch.Tensor:
        """The pixels of a slot; waits until they are pinned, if `pin` was called."""
        if self._pinned:
            self._pinned[slot].result()
        return self._view(slot)

    def array(self, slot: int) -> Pixels:
        """The same for a worker, which must not touch CUDA."""
        pixels: Pixels = self._view(slot).numpy()
        return pixels

    def _view(self, slot: int) -> torch.Tensor:
        first = slot * self._slot_bytes
        stored = self._memory[first : first + self._view_bytes].view(self._dtype).view(self._shape)
        return stored.permute(0, 2, 3, 1) if self._planar else stored

    def room(self, slot: int) -> torch.Tensor:
        """The bytes of a slot for encoded images, uint8 (room,)."""
        first = slot * self._slot_bytes + self._pixel_bytes
        return self._memory[first : first + self._room]

    def trim(self, slot: int, used: int) -> None:
        """Give back the memory of large images that a slot held before; of its room, so many bytes are in use."""
        kept = min(_whole_pages(max(2 * self.share, used)), self._room)
        first, after = slot * self._slot_bytes + self._pixel_bytes + kept, (slot + 1) * self._slot_bytes
        # It takes locks that the workers share.
        if self._grown[slot] and first < after:
            self._map.madvise(mmap.MADV_REMOVE, first, after - first)
        self._grown[slot] = used > 2 * self.share

    def close(self) -> None:
        """Unpin; the memory goes with its last reader."""
        if self._pinned:
            # Copies to the GPU may still be running, of batches that nobody waited for.
            torch.cuda.synchronize()
        for slot, pinned in enumerate(self._pinned):
            if not pinned.cancel() and pinned.exception() is None:
                torch.cuda.cudart().cudaHostUnregister(self._view(slot).data_ptr())


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _check(error: object) -> None:
    if int(error) != 0:  # type: ignore[call-overload]
        raise RuntimeError(f"cudaHostRegister could not pin the loader's memory: error {error}")
