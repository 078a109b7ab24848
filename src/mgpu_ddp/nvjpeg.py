"""nvJPEG: a batch of JPEGs → their planes of luma and chroma, by the JPEG engines of a GPU that has them.

The engines' inverse DCT yields the levels of libjpeg's, bit for bit (as `tests/gpu` checks). What nvJPEG itself makes
of the planes is further off, because it repeats chroma where libjpeg interpolates: `colours` does that here.

torchvision's wheels bring the library. Its functions are called bare, because torchvision's own decoder waits for each
batch under one lock: two batches at a time keep the engines busy where one leaves them idle a third of the time.
Source: nvjpeg.h; https://docs.nvidia.com/cuda/nvjpeg/index.html.
"""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

Integers = npt.NDArray[np.int64]
GPU_HYBRID, HARDWARE, YUV = 2, 3, 1
"""Backends, and the output format."""
ALLOCATOR_FAILURE = 5
NAMES = ("libnvjpeg.so.13", "libnvjpeg.so.12", "libnvjpeg.so")


class JpegError(RuntimeError):
    """The decoder refuses a file of a batch, and does not say which."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Planes:
    """n images as luma and chroma, all in `data`, uint8 (bytes,).

    Int64 each: plane p of image i begins at byte `starts[i, p]`; (n,) `heights` and `widths` in pixels; `across` and
    `down`, the pixels that share a sample of chroma, 1 or 2 along each axis, and 0 in a grey image, which has none.
    """

    data: torch.Tensor
    starts: Integers
    heights: Integers
    widths: Integers
    across: Integers
    down: Integers

    @classmethod
    def empty(
        cls, heights: Integers, widths: Integers, across: Integers, down: Integers, device: torch.device
    ) -> "Planes":
        """Room for images of these sizes."""
        luma, chroma = heights * widths, chroma_sizes(heights, down) * chroma_sizes(widths, across)
        total = luma + 2 * chroma
        first = np.cumsum(total) - total
        return cls(
            data=torch.empty(int(total.sum()), dtype=torch.uint8, device=device),
            starts=np.stack([first, first + luma, first + luma + chroma], axis=1),
            heights=heights,
            widths=widths,
            across=across,
            down=down,
        )


def chroma_sizes(sizes: Integers, shared: Integers) -> Integers:
    """Samples of chroma along one axis."""
    return np.where(shared > 0, -(-sizes // np.maximum(shared, 1)), 0)


@functools.cache
def library() -> ctypes.CDLL | None:
    """nvJPEG, or None where there is none."""
    import torchvision

    bundled = Path(torchvision.__file__).parent.parent / "torchvision.libs"
    for name in [*map(str, sorted(bundled.glob("libnvjpeg*.so*"))), *NAMES]:
        try:
            found = ctypes.CDLL(name)
        except OSError:
            continue
        pointer = ctypes.c_void_p
        found.nvjpegCreateEx.argtypes = [ctypes.c_int, pointer, pointer, ctypes.c_uint, pointer]
        found.nvjpegJpegStateCreate.argtypes = [pointer, pointer]
        found.nvjpegDecodeBatchedInitialize.argtypes = [pointer, pointer, ctypes.c_int, ctypes.c_int, ctypes.c_int]
        found.nvjpegDecodeBatched.argtypes = [pointer, pointer, pointer, pointer, pointer, pointer]
        return found
    return None


class Decoder:
    """What decodes one batch at a time on one device; several work side by side."""

    def __init__(self, device: torch.device) -> None:
        found = library()
        assert found is not None
        self._library, self._batch = found, 0
        self._handle, self._state = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.cuda.synchronize(device)
            self.has_engines = found.nvjpegCreateEx(HARDWARE, None, None, 0, ctypes.byref(self._handle)) == 0
            if not self.has_engines:
                _check(found.nvjpegCreateEx(GPU_HYBRID, None, None, 0, ctypes.byref(self._handle)))
            _check(found.nvjpegJpegStateCreate(self._handle, ctypes.byref(self._state)))

    def decode(self, addresses: Integers, lengths: Integers, planes: Planes, stream: torch.cuda.Stream) -> None:
        """Decode the files at these addresses of the host into `planes`, on `stream`, whose device is the current one.

        The caller's thread waits meanwhile, without the interpreter's lock. The planes must be free: the engines may
        write before the stream gets to what was queued on it earlier (seen by others on Hopper GPUs).

        Raises:
            JpegError: it refuses one of them.
        """
        n = len(addresses)
        if n != self._batch:
            _check(self._library.nvjpegDecodeBatchedInitialize(self._handle, self._state, n, 1, YUV))
            self._batch = n
        # nvjpegImage_t: four addresses of planes, then the bytes of a line of each.
        images = np.zeros((n, 8), dtype=np.uint64)
        coloured = planes.across > 0
        images[:, :3] = (planes.data.data_ptr() + planes.starts) * np.stack(
            [coloured | True, coloured, coloured], axis=1
        )
        images[:, 4] = planes.widths
        images[:, 5] = images[:, 6] = chroma_sizes(planes.widths, planes.across)
        arguments = [np.ascontiguousarray(array, dtype=np.uint64) for array in (addresses, lengths)]
        pointers = [array.ctypes.data for array in (*arguments, images)]
        status = self._library.nvjpegDecodeBatched(self._handle, self._state, *pointers, stream.cuda_stream)
        if status != 0:
            # What a failure leaves behind in the state is not to be relied on.
            self._batch = 0
        _check(status)


def _check(status: int) -> None:
    if status == ALLOCATOR_FAILURE:
        raise torch.OutOfMemoryError("nvJPEG must find memory for a batch on the GPU")
    if status != 0:
        raise JpegError(f"nvJPEG must decode the batch, got status {status}")
