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

    Image i is `lengths[i]` bytes at `addresses[i]` of this process. It belongs into row `rows[i]` of its batch, or of
    the batches that were joined, once its EXIF orientation `orientations[i]` is applied. It has `heights[i]` by
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
    spilt: list[torch.Tensor]
    """Keeps the memory of images that did not fit into their slot."""

    def __len__(self) -> int:
        return len(self.addresses)

    @classmethod
    def joined(cls, parts: "Sequence[Jpegs]", batch_size: int) -> "Jpegs":
        """Join the images of several batches, whose rows lie one batch after the other."""
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS}
        columns["rows"] += np.repeat(np.arange(len(parts)) * batch_size, [len(part) for part in parts])
        return cls(**columns, spilt=[tensor for part in parts for tensor in part.spilt])

    def content(self, number: int) -> bytes:
        return ctypes.string_at(int(self.addresses[number]), int(self.lengths[number]))


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedJpegs:
    """The images of one batch on their way from a worker to its rank."""

    records: npt.NDArray[np.void]
    """`RECORD` (k,), `addresses` counted from the start of the slot's room."""
    spilt: dict[int, bytes]
    """Images that the room did not hold, by their number."""

    def in_room(self, room: torch.Tensor) -> Jpegs:
        """Find the images in this process's view of the slot's room."""
        columns = {name: self.records[name] for name in COLUMNS}
        columns["addresses"] = columns["addresses"] + room.data_ptr()
        spilt = []
        for number, data in self.spilt.items():
            spilt.append(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            columns["addresses"][number] = spilt[-1].data_ptr()
        return Jpegs(**columns, spilt=spilt)


class JpegPacker:
    """Packs the images of one batch into its slot's room, uint8 (bytes,), one after the other."""

    def __init__(self, room: Pixels) -> None:
        self._room, self._used = room, 0
        self._records: list[tuple[int, ...]] = []
        self._spilt: dict[int, bytes] = {}

    def add(self, data: bytes, header: Header, row: int) -> None:
        first, after = self._used, self._used + len(data)
        if after <= len(self._room):
            self._room[first:after] = np.frombuffer(data, dtype=np.uint8)
            self._used = after
        else:
            self._spilt[len(self._records)] = data
        record = (first, len(data), row, header.orientation, header.height, header.width, *header.chroma)
        self._records.append(record)

    def packed(self) -> PackedJpegs:
        return PackedJpegs(records=np.array(self._records, dtype=RECORD), spilt=self._spilt)
