"""A padded batch, or a piece of one, as the loader hands it to its rank."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from mgpu_ddp.loader.jpegs import Jpegs
from mgpu_ddp.loader.shared_slots import SharedSlots
from mgpu_ddp.loader.worker import Made
from mgpu_ddp.preprocess.transform import Integers


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """n samples on their way to the model.

    `pixels`: uint8 (rows, height, width, 3), or float32 (rows, ...) that is model input already, in memory
    without gaps; rows of bad samples are zeros, rows past n too unless there are `jpegs`, and rows of those hold
    nothing of meaning. `index`: int64 (n,). `label`: int32 (n,). `errors`: dataset index → reason. `seconds`: worker
    time per stage. `pixels` and `jpegs` lie in memory that is used again: they hold until `held` batches later.
    """

    index: Integers
    label: npt.NDArray[np.int32]
    pixels: torch.Tensor
    jpegs: Jpegs | None
    """Images that are left to a GPU; None in a job whose workers decode all."""
    errors: dict[int, str]
    seconds: dict[str, float]
    raw: bool = False
    """`pixels` are as the source has them: the transform's geometry is still to come."""
    read_bytes: int = 0
    """All that its worker read in the meantime."""
    clipped: int = 0
    """Boxes that reached beyond their image."""
    carried: dict[str, npt.NDArray[np.generic]] = field(default_factory=dict)
    """Values that came with the samples, see `Rows`."""
    batch_size: int
    """Samples that the model takes at once."""
    rows: int
    """Rows of model input, padding included: several batches are one here where a GPU decodes what is small."""
    is_last: bool = True
    """The last piece of its batch, or all of it. Only what is left to a GPU comes in pieces, whose `pixels` have more
    rows than samples."""

    @classmethod
    def joined(cls, pieces: "Sequence[Batch]") -> "Batch":
        """All that is known of a batch's samples once its model input is made, without their pixels."""
        if len(pieces) == 1:
            return pieces[0]
        seconds: dict[str, float] = {}
        for piece in pieces:
            for stage, spent_s in piece.seconds.items():
                seconds[stage] = seconds.get(stage, 0.0) + spent_s
        return cls(
            index=np.concatenate([piece.index for piece in pieces]),
            label=np.concatenate([piece.label for piece in pieces]),
            pixels=pieces[0].pixels[:0],
            batch_size=pieces[0].batch_size,
            rows=pieces[0].rows,
            jpegs=None,
            errors={index: reason for piece in pieces for index, reason in piece.errors.items()},
            seconds=seconds,
            read_bytes=sum(piece.read_bytes for piece in pieces),
            clipped=sum(piece.clipped for piece in pieces),
            carried={name: np.ma.concatenate([piece.carried[name] for piece in pieces]) for name in pieces[0].carried},
        )

    def split(self) -> "Iterator[tuple[slice, Batch]]":
        """Yield the batches that are one here as the model takes them, each after its rows; without their pixels."""
        for first in range(0, len(self.index), self.batch_size):
            where = slice(first, first + self.batch_size)
            index = self.index[where]
            mine = {i: self.errors[i] for i in index.tolist() if i in self.errors} if self.errors else {}
            yield (
                where,
                replace(
                    self,
                    index=index,
                    label=self.label[where],
                    pixels=self.pixels[:0],
                    jpegs=None,
                    errors=mine,
                    seconds=self.seconds if first == 0 else {},
                    read_bytes=self.read_bytes if first == 0 else 0,
                    carried={name: values[where] for name, values in self.carried.items()},
                    rows=self.batch_size,
                ),
            )


def as_batch(
    made: Made, slots: SharedSlots, *, raw: bool = False, batch_size: int | None = None, rows: int | None = None
) -> Batch:
    """The batch in the rank's view of the slot that a worker filled, or a piece of what has so many rows."""
    pixels = slots.pixels(made.slot)
    return Batch(
        index=made.index,
        label=made.label,
        pixels=pixels,
        jpegs=made.jpegs.in_room(slots.room(made.slot)) if made.jpegs is not None else None,
        errors=made.errors,
        seconds=made.seconds,
        raw=raw,
        read_bytes=made.read_bytes,
        clipped=made.clipped,
        carried=made.carried,
        batch_size=batch_size or len(pixels),
        rows=rows or len(pixels),
        is_last=made.is_last,
    )
