"""Samples → padded batches, in order, read ahead by workers, in memory that is used again.

Images that a GPU decodes come in pieces of batches, which bounds what is read ahead in bytes; all workers read for the
first batch.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

from PIL import Image

from mgpu_ddp.config.resolved import Resolved
from mgpu_ddp.config.schema import ArrayConfig, Config, LoaderConfig
from mgpu_ddp.data.samples import Samples
from mgpu_ddp.distributed.host import available_bytes, require_memory
from mgpu_ddp.distributed.sharding import ShardSampler
from mgpu_ddp.distributed.world import World
from mgpu_ddp.loader.batch import Batch, as_batch
from mgpu_ddp.loader.shared_slots import SharedSlots
from mgpu_ddp.loader.worker import BatchMaker, Made, Order
from mgpu_ddp.loader.worker_pool import WorkerPool
from mgpu_ddp.preprocess.transform import AnyTransform, Layout, Transform

COPYING_WORKERS = 4
"""Enough workers where they only copy images to a GPU: they fill the memory bus."""
FIRST_PIECE = 4
"""Samples of a piece as long as nobody knows how large they are."""
SMALLEST_PIECE = 64
"""A slot's samples where a batch is not more: each piece costs its rank the same."""
LARGEST_PIECE = 256
"""More samples would only come later."""
PIECE_PIXELS = 3 << 25
"""Pixels of a piece, so that the GPU decodes it in one call."""
ENGINES = 7
"""JPEGs that an H200 decodes at a time, which nvJPEG does not tell: eight in a call take as long as fourteen."""


def num_workers(config: Config, world: World) -> int:
    """`loader.workers` with auto decided: the CPUs this process may use, shared among the ranks of its host."""
    if config.loader.workers != "auto":
        return int(config.loader.workers)
    # More would only make more slots, and each costs time when it is touched and pinned for the first time.
    copies = isinstance(config.data, ArrayConfig) and world.device.type == "cuda"
    return min(world.share_of_cpus, COPYING_WORKERS) if copies else world.share_of_cpus


def plan_slots(
    samples: Samples,
    rows: int,
    config: LoaderConfig,
    resolved: Resolved,
    world: World,
    *,
    held: int,
    size_key: str = "transform.size",
) -> tuple[int, Layout | None]:
    """The number of slots for so many samples, and the layout of images that a GPU resizes, where one does.

    `size_key` is what says how large the model input is.

    Raises:
        OutOfMemoryError: there is no memory for them.
    """
    transform, on_gpu = resolved.transform, world.device.type == "cuda"
    slot_rows, fewest = piece_rows(resolved), 1 if resolved.on_gpu else resolved.batch_size
    # A short job uses each slot once.
    num_slots = max(1, min(_ahead(config, resolved) + held, -(-rows // fewest)))
    room = available_bytes() // world.local_size
    raw = _raw_layout(samples, transform, num_slots * slot_rows, room) if on_gpu else None
    if raw is None:
        numbers = math.prod(transform.shape)
        num_bytes = numbers * transform.dtype.itemsize
        # On the CPU the model's input is there as well, in fp32.
        one = num_bytes if on_gpu else num_bytes + numbers * 4
        side = transform.shape[0] if size_key == "transform.size" else list(transform.shape[:2])
        require_memory(size_key, side, one, room, "Lower it.")
        remedy = "Lower it, or loader.workers or loader.prefetch, which read batches ahead."
        in_use = min(num_slots, _ahead(config, resolved) + 1) if resolved.on_gpu else num_slots
        require_memory("batch_size", resolved.batch_size, in_use * slot_rows * num_bytes, room, remedy)
    return num_slots, raw


@contextmanager
def load_batches(
    samples: Samples, sampler: ShardSampler, config: LoaderConfig, resolved: Resolved, world: World, *, held: int
) -> Iterator[Iterator[Batch]]:
    """Load this rank's samples in order, ahead of the model. Images that a GPU decodes stay encoded.

    The consumer may keep `held` batches or pieces. Workers and memory go when the block ends and not after the last
    batch, which would delay those that the consumer still keeps.

    Raises:
        OutOfMemoryError: there is no memory for the batches that are read ahead.
    """
    on_gpu, packed = world.device.type == "cuda", resolved.on_gpu
    batch_size, together = resolved.batch_size, resolved.rows_together
    num_slots, raw = plan_slots(samples, len(sampler), config, resolved, world, held=held)
    transform, planar = resolved.transform, raw is not None and raw.planar
    if isinstance(transform, Transform):
        transform = replace(transform, scaled=resolved.decode == "scaled")
    if raw is not None and isinstance(transform, Transform):
        transform = transform.without_geometry((raw.height, raw.width))
    rows = piece_rows(resolved)
    slots = SharedSlots(num_slots, rows, transform.shape, dtype=transform.dtype, planar=planar, packed=packed)
    # Pillow warns above this and refuses twice as much. Workers inherit it.
    Image.MAX_IMAGE_PIXELS = config.max_pixels // 2
    maker = BatchMaker(samples, transform, slots, config, packed=packed)
    batches = sampler.batches(together)
    pieces = Pieces(batches, rows, slots.share)
    orders = iter(pieces) if packed else (Order(indices=indices) for indices in batches)
    with closing(slots), closing(WorkerPool(maker, resolved.workers, num_slots)) as pool:
        if on_gpu and not packed:
            slots.pin()
        made = pool.make(orders, ahead=_ahead(config, resolved), held=held)
        yield (
            as_batch(pieces.seen(each), slots, raw=raw is not None, batch_size=batch_size, rows=together)
            for each in made
        )


def piece_rows(resolved: Resolved) -> int:
    """Samples of a slot."""
    if not resolved.on_gpu:
        return resolved.batch_size
    return min(max(resolved.batch_size, SMALLEST_PIECE), LARGEST_PIECE, resolved.rows_together)


def _ahead(config: LoaderConfig, resolved: Resolved) -> int:
    return max(1, resolved.workers * config.prefetch)


class Pieces:
    """Cuts batches into orders of as many images as their slot's share and a call of the decoder hold.

    Judged by the pieces before.
    """

    def __init__(self, batches: Iterable[list[int]], rows: int, share: int) -> None:
        """A slot has so many `rows`, and a `share` of the bytes."""
        self._batches, self._rows, self._share = batches, rows, share
        self._most = min(FIRST_PIECE, rows)

    def __iter__(self) -> Iterator[Order]:
        for indices in self._batches:
            at = 0
            while at < len(indices):
                left = len(indices) - at
                # Of about the same size, rather than a small one at the end.
                stop = at + -(-left // -(-left // self._most))
                yield Order(indices=indices[at:stop], is_last=stop == len(indices))
                at = stop

    def seen(self, made: Made) -> Made:
        """Pass a result on, and cut what comes next by what its images weigh."""
        pixels = made.jpegs.pixels if made.jpegs is not None else 0
        by_bytes = self._share * len(made.index) // max(made.encoded_bytes, 1)
        fitting = min(by_bytes, PIECE_PIXELS * len(made.index) // max(pixels, 1))
        if fitting > ENGINES:
            fitting -= fitting % ENGINES
        self._most = max(1, min(self._rows, fitting))
        return made


def _raw_layout(samples: Samples, transform: AnyTransform, num_images: int, room: int) -> Layout | None:
    """The layout of images that workers copy as they are for the GPU to resize; None where workers resize.

    `num_images` of them must fit into half of `room`, in bytes.
    """
    layout = samples.layout
    if layout is None or not transform.may_resize(layout.width, layout.height):
        return None
    return layout if 2 * num_images * layout.height * layout.width * 3 <= room else None
