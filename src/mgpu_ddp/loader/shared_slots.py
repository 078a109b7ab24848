"""Memory that loader workers fill and their rank reads, in slots of one batch that are used again and again.

A batch in new memory would cost a shared-memory file, page faults for every byte and a copy into pinned memory. The
slots are made once, before the workers fork, and pinned once, in the background while the first batches are made.
"""

import mmap
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from mgpu_ddp.data import shared_memory
from mgpu_ddp.preprocess.transform import Pixels

JPEG_BYTES = 1 << 20
"""A slot's room for encoded images, per image. Pages that are never written to take no memory."""
PINNING_THREADS = 4
"""One thread takes longer to touch pages for the first time than the model takes for the images on them."""


class SharedSlots:
    """Slots of one batch each: its pixels (batch_size, *shape) of `dtype`, and room for encoded images.

    Where `planar`, the channels of an image, (height, width, 3), lie apart in memory. There is room for encoded images
    only where `packed`.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype = torch.uint8,
        planar: bool = False,
        packed: bool = False,
    ) -> None:
        self._shape = (batch_size, shape[-1], *shape[:-1]) if planar else (batch_size, *shape)
        self._planar, self._dtype = planar, dtype
        self._view_bytes = int(np.prod(self._shape)) * dtype.itemsize
        self._pixel_bytes = _whole_pages(self._view_bytes)
        self._room = _whole_pages(batch_size * JPEG_BYTES) if packed else 0
        self._slot_bytes = self._pixel_bytes + self._room
        self._memory = torch.frombuffer(shared_memory.allocate(count * self._slot_bytes), dtype=torch.uint8)
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
