"""A padded batch, as the loader hands it to its rank."""

from dataclasses import dataclass, field

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

    `pixels`: uint8 (batch_size, height, width, 3), or float32 (batch_size, ...) that is model input already, in memory
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
    carried: dict[str, npt.NDArray[np.generic]] = field(default_factory=dict)
    """Values that came with the samples, see `Rows`."""


def as_batch(made: Made, slots: SharedSlots, *, raw: bool = False) -> Batch:
    """The batch in the rank's view of the slot that a worker filled."""
    return Batch(
        index=made.index,
        label=made.label,
        pixels=slots.pixels(made.slot),
        jpegs=made.jpegs.in_room(slots.room(made.slot)) if made.jpegs is not None else None,
        errors=made.errors,
        seconds=made.seconds,
        raw=raw,
        read_bytes=made.read_bytes,
        carried=made.carried,
    )
