"""JPEGs that stay encoded for a GPU: a worker packs them into its slot, its rank finds them there."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mgpu_ddp.preprocess.jpeg_header import Header
from mgpu_ddp.preprocess.transform import Integers, Pixels, Window

COLUMNS = ("addresses", "lengths", "rows", "orientations", "heights", "widths", "down", "across", "windows")
RECORD = np.dtype([*((name, np.int64) for name in COLUMNS[:-1]), (COLUMNS[-1], np.int64, 4)])
"""One sample; `Jpegs` tells what each column holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Jpegs:
    """k samples of encoded images, int64 (k,) each.

    The image of sample i is `lengths[i]` bytes at `addresses[i]` of this process; samples of one image follow each
    other. It belongs into row `rows[i]` of its piece, or of what the pieces were joined to, once the image's EXIF
    orientation `orientations[i]` is applied and `windows[i]` (left, top, right, bottom; (k, 4)) is cut out. The image
    has `heights[i]` by `widths[i]` pixels, of which `down[i]` by `across[i]` share a sample of chroma, 0 by 0 in a grey
    one.
    """

    addresses: Integers
    lengths: Integers
    rows: Integers
    orientations: Integers
    heights: Integers
    widths: Integers
    down: Integers
    across: Integers
    windows: Integers

    def __len__(self) -> int:
        return len(self.addresses)

    @classmethod
    def joined(cls, parts: "Sequence[Jpegs]", first_rows: Sequence[int]) -> "Jpegs":
        """Join the images of several pieces, of which each has its first row."""
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS}
        columns["rows"] += np.repeat(first_rows, [len(part) for part in parts])
        return cls(**columns)

    @property
    def firsts(self) -> Integers:
        """The first sample of each image."""
        return np.flatnonzero(np.diff(self.addresses, prepend=0))

    @property
    def pixels(self) -> int:
        """Pixels of all images."""
        firsts = self.firsts
        return int(self.heights[firsts] @ self.widths[firsts])

    def of_images(self, numbers: Integers) -> tuple[Integers, Integers]:
        """The samples of consecutive images, by the numbers of these, and for each sample its image's place in them."""
        stops = np.append(self.firsts, len(self))
        samples = np.arange(stops[numbers[0]], stops[numbers[-1] + 1])
        return samples, np.repeat(np.arange(len(numbers)), np.diff(stops)[numbers])

    def __getitem__(self, numbers: Integers) -> "Jpegs":
        return Jpegs(**{name: getattr(self, name)[numbers] for name in COLUMNS})

    def content(self, number: int) -> bytes:
        return ctypes.string_at(int(self.addresses[number]), int(self.lengths[number]))


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedJpegs:
    """The samples of one piece on their way from a worker to its rank."""

    records: npt.NDArray[np.void]
    """`RECORD` (k,), `addresses` counted from the start of the slot's room."""
    pixels: int
    """Of all images."""

    def in_room(self, room: torch.Tensor) -> Jpegs:
        """Find the images in this process's view of the slot's room."""
        columns = {name: self.records[name] for name in COLUMNS}
        columns["addresses"] = columns["addresses"] + room.data_ptr()
        return Jpegs(**columns)


class JpegPacker:
    """Packs the images of one piece into its slot's room, uint8 (bytes,), one after the other."""

    def __init__(self, room: Pixels) -> None:
        self._room = room
        self.most = len(room)
        """Bytes of the largest image that an empty room holds."""
        self._records: list[tuple[Any, ...]] = []
        self._last: bytes | None = None
        self._pixels = 0
        self.used = 0
        """Bytes of the room."""

    def add(self, data: bytes, header: Header, row: int, window: Window) -> bool:
        """Pack an image, once for all windows that follow each other; False if what is left of the room is too small.

        The same image comes as the very same object.
        """
        if data is not self._last:
            after = self.used + len(data)
            if after > self.most:
                return False
            self._room[self.used : after] = np.frombuffer(data, dtype=np.uint8)
            self.used = after
            self._last = data
            self._pixels += header.height * header.width
        first = self.used - len(data)
        record = (first, len(data), row, header.orientation, header.height, header.width, *header.chroma, window)
        self._records.append(record)
        return True

    def packed(self) -> PackedJpegs:
        return PackedJpegs(records=np.array(self._records, dtype=RECORD), pixels=self._pixels)
