"""Images that were decoded before: one `.npy` of uint8, mapped into memory and copied batch by batch."""

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mgpu_ddp.config.checks import require
from mgpu_ddp.config.schema import ArrayConfig
from mgpu_ddp.data.input_file import open_input, require_input
from mgpu_ddp.data.listing import no_names
from mgpu_ddp.data.samples import Samples
from mgpu_ddp.errors import StateError, UsageError, cause_of
from mgpu_ddp.preprocess.transform import AnyTransform, Layout, Pixels, StageClock, copy_pixels

MAPPED_BYTES = 1 << 16
"""A read fault maps so much of shared memory. Source: fault_around_bytes of Linux."""
SAVE_IMAGES = "Save images with np.save, uint8, as (n, height, width, 3) or (n, 3, height, width)."


def open_array(path: str) -> Pixels:
    """Map an array of images: uint8 (n, height, width, 3), a view where the file has channels first.

    Raises:
        UsageError: there is no such array there.
    """
    require(not path.endswith(".npz"), "data.path", "one array in a .npy, which can be mapped", path, SAVE_IMAGES)
    try:
        require_input(path)
        # Refuses archives of arrays, whatever their name, and arrays of objects, which could run code.
        array: Any = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy raises all kinds for what is broken
        raise UsageError(f"data.path={path!r} cannot be read as a .npy ({cause_of(error)}). {SAVE_IMAGES}") from None
    is_images = array.dtype == np.uint8 and array.ndim == 4 and 3 in (array.shape[1], array.shape[3])
    is_images = is_images and 0 not in array.shape[1:]
    rule = "uint8 images of three channels and at least one pixel"
    require(is_images, "data.path", rule, f"{path}: {array.dtype} {array.shape}", SAVE_IMAGES)
    images: Pixels = array if array.shape[3] == 3 else array.transpose(0, 2, 3, 1)
    return images


class ArraySamples(Samples):
    """The images of an array, in its order."""

    def __init__(self, config: ArrayConfig) -> None:
        images: Any = open_array(config.path)
        self._images, self._offset = images, int(images.offset)
        self._path, self._state = config.path, _state_of(os.stat(config.path))
        _, height, width, _ = images.shape
        self._planar = images.strides[-1] != 1
        self.layout = Layout(height=height, width=width, planar=self._planar)

    def __len__(self) -> int:
        return len(self._images)

    def fill(self, indices: Sequence[int], transform: AnyTransform, pixels: Pixels, clock: StageClock) -> bool:
        """Copy images into the first rows of a batch at once; False if they must be resized one by one.

        Raises:
            StateError: the file is not what it was when the job began.
        """
        corner = transform.cut(*self._images.shape[1:3])
        step = indices[1] - indices[0] if len(indices) > 1 else 1
        evenly = range(indices[0], indices[0] + step * len(indices), step)
        if corner is None or step < 1 or list(indices) != list(evenly):
            return False
        started = time.perf_counter()
        (top, left), (height, width, _) = corner, transform.shape
        if not self._read(evenly, pixels[: len(indices)]):
            chosen = self._images[evenly.start : evenly.stop : step]
            copy_pixels(chosen[:, top : top + height, left : left + width], pixels[: len(indices)])
        clock("read", time.perf_counter() - started)
        return True

    def _read(self, indices: range, pixels: Pixels) -> bool:
        """Read whole images into place, without the page faults of a mapping; False if their layout differs."""
        order = (0, 3, 1, 2) if self._planar else (0, 1, 2, 3)
        stored, into = self._images.transpose(order), pixels.transpose(order)
        if stored.shape[1:] != into.shape[1:] or not stored.flags.c_contiguous or not into.flags.c_contiguous:
            return False
        # Slots that another worker has filled are mapped 16 pages per fault by a read, one page per fault by a write.
        into.reshape(-1)[::MAPPED_BYTES].max()
        runs = [(indices.start, into)] if indices.step == 1 else zip(indices, into, strict=True)
        with open_input(self._path) as file:
            same = _state_of(os.fstat(file.fileno())) == self._state
            for first, rows in runs:
                left: Any = memoryview(rows).cast("B")  # type: ignore[arg-type]
                at = self._offset + first * into[0].nbytes
                while same and len(left):
                    read = os.preadv(file.fileno(), [left], at)
                    same, left, at = read > 0, left[read:], at + read
        if not same:
            raise StateError(f"{self._path} (data.path) was changed while the job read it. Restore it and start again.")
        return True

    def load(
        self, index: int, transform: AnyTransform, clock: StageClock, data: bytes | None = None
    ) -> tuple[Pixels, int]:
        started = time.perf_counter()
        image = np.ascontiguousarray(self._images[index])
        was_read = time.perf_counter()
        clock("read", was_read - started)
        pixels = transform.of_pixels(image)
        clock("resize", time.perf_counter() - was_read)
        return pixels, -1

    def names(self, indices: npt.NDArray[np.int64]) -> Any:
        return no_names(len(indices))


def _state_of(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def identity(config: ArrayConfig) -> str:
    """Tell one array from another without reading it."""
    return f"{open_array(config.path).shape}, modified {os.stat(config.path).st_mtime_ns}"
