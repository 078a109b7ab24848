"""JPEGs that stay encoded for a GPU: a worker packs them into its slot, its rank finds them there."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from mgpu_ddp.preprocess.jpeg_header import Header
from mgpu_ddp.preprocess.transform import Integers, Pixels

COLUMNS = ("addresses", "lengths", "rows", "orientations", "heights", "widths", "down", "across")
RECORD = np.dtype([(name, np.int64) for name in COLUMNS])
"""One image; `Jpegs` tells what each column holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Jpegs:
    """k encoded images, int64 (k,) each.

    Image i is `lengths[i]` bytes at `addresses[i]` of this process. It belongs into row `rows[i]` of its piece, or of
    what the pieces were joined to, once its EXIF orientation `orientations[i]` is applied. It has `heights[i]` by
    `widths[i]` pixels, of which `down[i]` by `across[i]` share a sample of chroma, 0 by 0 in a grey image.
    """

    addresses: Integers
    lengths: Integers
    rows: Integers
    orientations: Integers
    heights: Integers
    widths: Integers
    down: Integers
    across: Integers

    def __len__(self) -> int:
        return len(self.addresses)

    @classmethod
    def joined(cls, parts: "Sequence[Jpegs]", first_rows: Sequence[int]) -> "Jpegs":
        """Join the images of several pieces, of which each has its first row."""
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS}
        columns["rows"] += np.repeat(first_rows, [len(part) for part in parts])
        return cls(**columns)

    def content(self, number: int) -> bytes:
        return ctypes.string_at(int(self.addresses[number]), int(self.lengths[number]))


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedJpegs:
    """The images of one piece on their way from a worker to its rank."""

    records: npt.NDArray[np.void]
    """`RECORD` (k,), `addresses` counted from the start of the slot's room."""

    @property
    def pixels(self) -> int:
        return int(self.records["heights"] @ self.records["widths"])

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
        self._records: list[tuple[int, ...]] = []
        self.used = 0
        """Bytes of the room."""

    def add(self, data: bytes, header: Header, row: int) -> bool:
        """Pack an image; False if what is left of the room does not hold it."""
        first, after = self.used, self.used + len(data)
        if after > self.most:
            return False
        self._room[first:after] = np.frombuffer(data, dtype=np.uint8)
        self.used = after
        record = (first, len(data), row, header.orientation, header.height, header.width, *header.chroma)
        self._records.append(record)
        return True

    def packed(self) -> PackedJpegs:
        return PackedJpegs(records=np.array(self._records, dtype=RECORD))
