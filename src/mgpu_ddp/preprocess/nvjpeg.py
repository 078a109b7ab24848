"""nvJPEG: a batch of JPEGs → RGB, or planes of luma and chroma, by the JPEG engines of a GPU that has them.

The engines' inverse DCT yields the levels of libjpeg's, bit for bit (as `tests/gpu` checks). nvJPEG's RGB is a few
levels off, because it repeats chroma where libjpeg interpolates. `ycbcr_kernel` converts planes as libjpeg does, but
nvJPEG yields planes more slowly than RGB.

torchvision's wheels, or NVIDIA's own, bring the library. It is called directly, because torchvision's own decoder
holds the library while it copies the files to where the engines can read them, and waits before and after. Source:
nvjpeg.h; https://docs.nvidia.com/cuda/nvjpeg/index.html.
"""

import ctypes
import functools
import importlib.util
import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from mgpu_ddp.preprocess.transform import Integers

GPU_HYBRID, HARDWARE = 2, 3
"""Backends."""
YUV, RGB = 1, 3
"""Output formats."""
ALLOCATOR_FAILURE = 5
NAMES = ("libnvjpeg.so.13", "libnvjpeg.so.12", "libnvjpeg.so")


class JpegError(RuntimeError):
    """The decoder refused a file of a batch, and does not say which."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """n encoded images in host memory, which is best pinned: int64 (n,) each."""

    addresses: Integers
    lengths: Integers

    def __getitem__(self, numbers: Integers) -> "Files":
        return Files(addresses=self.addresses[numbers], lengths=self.lengths[numbers])


@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """n decoded images in `data`, uint8 (bytes,).

    Image i is (3, heights[i], widths[i]), its planes one after the other, from byte `starts[i]` on; int64 (n,) each.
    Where `interleaved`, the channels of each pixel lie together instead.
    """

    OUTPUT: ClassVar[int] = RGB
    data: torch.Tensor
    starts: Integers
    heights: Integers
    widths: Integers
    interleaved: bool = False

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, numbers: Integers) -> "Images":
        """Images by their numbers, the same one several times if need be: the same memory."""
        places = {name: getattr(self, name)[numbers] for name in ("starts", "heights", "widths")}
        return replace(self, **places)

    @classmethod
    def of(cls, pixels: torch.Tensor) -> "Images":
        """Images of one size, uint8 (n, height, width, 3), without gaps: the same memory."""
        n, height, width, _ = pixels.shape
        interleaved = pixels.is_contiguous()
        return cls(
            data=(pixels if interleaved else pixels.permute(0, 3, 1, 2)).view(-1),
            starts=np.arange(n) * 3 * height * width,
            heights=np.full(n, height),
            widths=np.full(n, width),
            interleaved=interleaved,
        )

    @classmethod
    def empty(cls, heights: Integers, widths: Integers, device: torch.device) -> "Images":
        """Room for images of these sizes."""
        sizes = 3 * heights * widths
        data = _memory(int(sizes.sum()), device)
        return cls(data=data, starts=np.cumsum(sizes) - sizes, heights=heights, widths=widths)

    @property
    def planes(self) -> Integers:
        """First byte of each plane, (n, 3)."""
        return self.starts[:, None] + (self.heights * self.widths)[:, None] * np.arange(3)

    @property
    def lines(self) -> Integers:
        """Bytes of a line of each plane, (n, 3)."""
        return np.stack([self.widths] * 3, axis=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Planes:
    """n images as luma and chroma, all in `data`, uint8 (bytes,).

    Int64 each: plane p of image i begins at byte `planes[i, p]`; (n,) `heights` and `widths` in pixels; `across` and
    `down`, the pixels that share a sample of chroma, 1 or 2 along each axis, and 0 in a grey image, which has none.
    """

    OUTPUT: ClassVar[int] = YUV
    data: torch.Tensor
    planes: Integers
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
            data=_memory(int(total.sum()), device),
            planes=np.stack([first, first + luma, first + luma + chroma], axis=1),
            heights=heights,
            widths=widths,
            across=across,
            down=down,
        )

    @property
    def lines(self) -> Integers:
        """Bytes of a line of each plane, (n, 3); 0 where there is no such plane."""
        chroma = chroma_sizes(self.widths, self.across)
        return np.stack([self.widths, chroma, chroma], axis=1)


def _memory(num_bytes: int, device: torch.device) -> torch.Tensor:
    """At least so many bytes of a device, in few sizes: what one call has given back then serves the next.

    Four sizes from one power of two to the next, times the three bytes of a pixel. Else torch would keep memory of each
    size that ever occurred.
    """
    pixels = -(-num_bytes // 3)
    step = max(1, 1 << pixels.bit_length() - 1 >> 2)
    rounded = 3 * step * -(-pixels // step)
    return torch.empty(rounded, dtype=torch.uint8, device=device)


def chroma_sizes(sizes: Integers, shared: Integers) -> Integers:
    """Samples of chroma along one axis."""
    return np.where(shared > 0, -(-sizes // np.maximum(shared, 1)), 0)


def places() -> Iterator[Path]:
    """Yield the folders in which packages bring the library: torchvision, then NVIDIA's own for CUDA 13 and for 12."""
    # Found rather than imported: how a process first imports torchvision is for mgpu_ddp.models to say.
    torchvision, nvidia = importlib.util.find_spec("torchvision"), importlib.util.find_spec("nvidia")
    if torchvision is not None and torchvision.origin is not None:
        yield Path(torchvision.origin).parent.parent / "torchvision.libs"
    for root in nvidia.submodule_search_locations or () if nvidia is not None else ():
        yield from (Path(root) / "cu13" / "lib", Path(root) / "nvjpeg" / "lib")


@functools.cache
def library() -> ctypes.CDLL | None:
    """nvJPEG, or None where there is none."""
    bundled = [str(path) for place in places() for path in sorted(place.glob("libnvjpeg*.so*"))]
    for name in [*bundled, *NAMES]:
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


def library_version() -> str:
    """The version of nvJPEG; empty where there is none."""
    found, number = library(), ctypes.c_int()
    if found is None:
        return ""
    # Source: nvJPEG's documentation, nvjpegGetProperty; 0, 1 and 2 are MAJOR_VERSION, MINOR_VERSION and PATCH_LEVEL.
    numbers = []
    for which in range(3):
        found.nvjpegGetProperty(which, ctypes.byref(number))
        numbers.append(str(number.value))
    return ".".join(numbers)


@dataclass(kw_only=True, slots=True)
class _State:
    """The library's state and the stream of one batch while it is decoded."""

    handle: ctypes.c_void_p
    stream: torch.cuda.Stream
    ready_for: tuple[int, int] = (0, 0)
    """(batch size, output format) that it was initialised for."""


class _Lane:
    """One handle of the library, called by one thread, which decodes batches in the order in which they come.

    A batch is waited for before its state and its stream are used again. Without that, batches deadlocked: with two
    decoders side by side, and with one state on several streams (H200, driver 580).
    """

    STATES = 2
    """The engines decode one batch while the colours of the one before are made."""

    def __init__(self, backend: int, found: ctypes.CDLL, device: torch.device) -> None:
        self._library = found
        self._handle = ctypes.c_void_p()
        _check(found.nvjpegCreateEx(backend, None, None, 0, ctypes.byref(self._handle)))
        self._states: SimpleQueue[_State] = SimpleQueue()
        for _ in range(self.STATES):
            state = _State(handle=ctypes.c_void_p(), stream=torch.cuda.Stream(device))
            _check(found.nvjpegJpegStateCreate(self._handle, ctypes.byref(state.handle)))
            self._states.put(state)
        self._thread = ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(device,))

    def decode(self, arguments: list[npt.NDArray[np.uint64]], output: int) -> float:
        """Decode a batch and wait for it; returns the seconds spent in the library."""
        state, spent_s = self._thread.submit(self._call, arguments, output).result()
        self._give_back(state)
        return spent_s

    def _call(self, arguments: list[npt.NDArray[np.uint64]], output: int) -> tuple[_State, float]:
        state, wanted = self._states.get(), (len(arguments[0]), output)
        try:
            started = time.perf_counter()
            if state.ready_for != wanted:
                _check(self._library.nvjpegDecodeBatchedInitialize(self._handle, state.handle, wanted[0], 1, output))
            # A failure may leave the state broken.
            state.ready_for = 0, 0
            pointers = [array.ctypes.data for array in arguments]
            _check(self._library.nvjpegDecodeBatched(self._handle, state.handle, *pointers, state.stream.cuda_stream))
            state.ready_for = wanted
            return state, time.perf_counter() - started
        except BaseException:
            self._give_back(state)
            raise

    def _give_back(self, state: _State) -> None:
        try:
            state.stream.synchronize()
        finally:
            # Also where the device has failed: whoever waits for a state must learn of it.
            self._states.put(state)


class Decoder:
    """Decodes batches on one device, for any thread, in about the order in which they come."""

    LANES = 2
    """Handles side by side: one calling thread is too slow for the engines, and a third adds nothing."""

    def __init__(self, device: torch.device) -> None:
        found = library()
        assert found is not None
        self._began: dict[int, float] = {}
        with torch.cuda.device(device):
            torch.cuda.synchronize(device)
            self.has_engines = True
            try:
                self._lanes = [_Lane(HARDWARE, found, device) for _ in range(self.LANES)]
            except JpegError:
                self.has_engines = False
                self._lanes = [_Lane(GPU_HYBRID, found, device)]
        self._turns = itertools.cycle(self._lanes)

    def decode(self, files: Files, into: Images | Planes) -> float:
        """Decode files on the current device, into memory that is free; returns the seconds it took.

        The calling thread waits meanwhile, without the GIL.

        Raises:
            JpegError: nvJPEG refuses one of them.
        """
        # nvjpegImage_t: four addresses of planes, then the bytes of a line of each.
        images = np.zeros((len(into.heights), 8), dtype=np.uint64)
        images[:, :3] = into.data.data_ptr() + into.planes
        images[:, 4:7] = into.lines
        images[:, :3][into.lines == 0] = 0
        arguments = [np.ascontiguousarray(array, dtype=np.uint64) for array in (files.addresses, files.lengths)]
        key = id(images)
        self._began[key] = time.perf_counter()
        try:
            return next(self._turns).decode([*arguments, images], into.OUTPUT)
        finally:
            del self._began[key]

    @property
    def longest_s(self) -> float:
        """Seconds since the oldest batch that is not done was begun; 0 where there is none."""
        return max((time.perf_counter() - began for began in list(self._began.values())), default=0.0)


def _check(status: int) -> None:
    if status == ALLOCATOR_FAILURE:
        raise torch.OutOfMemoryError("nvJPEG found no memory for a batch on the GPU")
    if status != 0:
        raise JpegError(f"nvJPEG refused a batch with status {status}")
