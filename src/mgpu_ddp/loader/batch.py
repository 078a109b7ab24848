"""What a loader hands to its rank: a padded batch, with the images that are left to a GPU."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch

from mgpu_ddp.loader.shared_slots import Ring
from mgpu_ddp.loader.worker import Integers, Made


@dataclass(frozen=True, kw_only=True, slots=True)
class Jpegs:
    """k encoded images that are left to the GPU, int64 (k,) each.

    Image i is `lengths[i]` bytes at `addresses[i]` of this process. It belongs into row `places[i]` of the batch once
    its EXIF orientation `orientations[i]` is applied. It has `heights[i]` by `widths[i]` pixels, of which `down[i]`
    by `across[i]` share a sample of chroma, 0 by 0 in a grey image.
    """

    addresses: Integers
    lengths: Integers
    places: Integers
    orientations: Integers
    heights: Integers
    widths: Integers
    down: Integers
    across: Integers
    spilt: list[torch.Tensor]
    """Keeps what some of the addresses point to."""

    def __len__(self) -> int:
        return len(self.addresses)

    @classmethod
    def joined(cls, parts: "Sequence[Jpegs]", batch_size: int) -> "Jpegs":
        """Those of several batches, `places` in the row of all their batches."""
        integers = {
            f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls) if f.name != "spilt"
        }
        integers["places"] += np.repeat(np.arange(len(parts)) * batch_size, [len(part) for part in parts])
        return cls(**integers, spilt=[tensor for part in parts for tensor in part.spilt])

    def content(self, number: int) -> bytes:
        return ctypes.string_at(int(self.addresses[number]), int(self.lengths[number]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """n samples on their way to the model.

    `pixels`: uint8 (batch_size, height, width, 3), in memory without gaps; rows of bad samples are zeros, rows past n
    too unless there are `jpegs`, and rows of those hold nothing of meaning. `index`: int64 (n,). `label`: int32 (n,).
    `errors`: dataset index → reason. `seconds`: worker time per stage. `pixels` and `jpegs` lie in memory that is used
    again: they hold until `held` batches later.
    """

    index: npt.NDArray[np.int64]
    label: npt.NDArray[np.int32]
    pixels: torch.Tensor
    jpegs: Jpegs | None
    errors: dict[int, str]
    seconds: dict[str, float]
    raw: bool = False
    """Whether `pixels` are as the source has them, so that the transform's geometry is still to come."""
    read_bytes: int = 0
    """What its worker asked the kernel for in the meantime, as of all files."""


def as_batch(made: Made, ring: Ring, *, packed: bool = False, raw: bool = False) -> Batch:
    """A worker's batch as the rank sees it."""
    jpegs: Jpegs | None = None
    if packed:
        first, lengths, *columns = made.jpegs.T
        addresses, spilt = ring.room(made.slot).data_ptr() + first, []
        for number, data in made.spilt.items():
            spilt.append(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            addresses[number], lengths[number] = spilt[-1].data_ptr(), len(data)
        names = ("places", "orientations", "heights", "widths", "down", "across")
        jpegs = Jpegs(addresses=addresses, lengths=lengths, **dict(zip(names, columns, strict=True)), spilt=spilt)
    return Batch(
        index=made.index,
        label=made.label,
        pixels=ring.pixels(made.slot),
        jpegs=jpegs,
        errors=made.errors,
        seconds=made.seconds,
        raw=raw,
        read_bytes=made.read_bytes,
    )
