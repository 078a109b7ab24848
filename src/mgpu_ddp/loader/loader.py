"""Loader workers → batches, in order, in memory that is used again."""

import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

from PIL import Image
from torch.utils.data import BatchSampler

from mgpu_ddp.config.schema import ArrayConfig, Config, LoaderConfig
from mgpu_ddp.data.datasets import Samples
from mgpu_ddp.distributed.host import available_bytes
from mgpu_ddp.distributed.sharding import ShardSampler
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import OutOfMemoryError
from mgpu_ddp.loader.batch import Batch, as_batch
from mgpu_ddp.loader.shared_slots import Ring
from mgpu_ddp.loader.spare import Share
from mgpu_ddp.loader.worker import BatchMaker, Order
from mgpu_ddp.loader.worker_pool import WorkerPool
from mgpu_ddp.preprocess.transform import Transform

COPYING_WORKERS = 4
"""That only copy images to a GPU: they fill the memory bus."""


class Orders:
    """A sampler's indices in batches. Where workers decode a share of them, it is looked at after so many `slots`."""

    def __init__(self, sampler: ShardSampler, batch_size: int, slots: int, share: Share | None = None) -> None:
        self._batches, self._slots, self._share = BatchSampler(sampler, batch_size, drop_last=False), slots, share

    def __iter__(self) -> Iterator[Order]:
        for number, indices in enumerate(self._batches):
            decode = 0
            if self._share:
                if number and number % self._slots == 0:
                    self._share.adjust()
                decode = int(self._share.now * len(indices))
            yield Order(indices=indices, decode=decode)


def num_workers(config: Config, world: World) -> int:
    """`loader.workers` with auto decided: the CPUs this process may use, shared among the ranks of its host."""
    if config.loader.workers != "auto":
        return int(config.loader.workers)
    # More would only make more slots, and each costs time when it is touched and pinned for the first time.
    copies = isinstance(config.data, ArrayConfig) and world.device.type == "cuda"
    return min(world.share_of_cpus, COPYING_WORKERS) if copies else world.share_of_cpus


@contextmanager
def load_batches(
    samples: Samples,
    sampler: ShardSampler,
    transform: Transform,
    config: LoaderConfig,
    batch_size: int,
    world: World,
    *,
    held: int,
    packed: bool = False,
    share: Share | None = None,
) -> Iterator[Iterator[tuple[Batch, float]]]:
    """This rank's samples in order, read ahead of the model; each batch with the seconds its consumer waited.

    What made them is put away with the block, not after the last batch, which would keep those before it waiting.
    `config.workers` must be a number. With `packed`, images that a GPU can decode stay encoded, all but the `share` of
    them that is for the workers. `held` is how many batches the consumer may keep.
    """
    workers = int(config.workers)
    # A short job uses none of them again.
    slots = max(1, min(workers * config.prefetch + held, -(-len(sampler) // batch_size)))
    on_gpu = world.device.type == "cuda"
    layout = samples.layout if on_gpu else None
    most, num_images = available_bytes() // world.local_size, slots * batch_size
    if layout is not None and (
        2 * num_images * layout.height * layout.width * 3 > most
        or not transform.may_resize(layout.width, layout.height)
    ):
        layout = None
    size, planar = ((layout.height, layout.width), layout.planar) if layout else (transform.out_size, False)
    if layout:
        transform = transform.without_geometry(size)
    needed = num_images * math.prod(size) * 3
    if needed > most:
        raise OutOfMemoryError(
            f"batch_size must fit into memory, got {batch_size} on rank {world.rank} of {world.size}: {slots} batches"
            f" read ahead take {needed / 2**30:,.1f} GiB. Lower it, or loader.workers or loader.prefetch."
        )
    ring = Ring(slots, batch_size, size, planar=planar, packed=packed)
    # Pillow warns from here on and refuses at twice as much. Workers inherit it.
    Image.MAX_IMAGE_PIXELS = config.max_pixels // 2
    maker = BatchMaker(samples, transform, ring, config, packed=packed)
    orders = Orders(sampler, batch_size, slots, share)

    def batches(pool: WorkerPool) -> Iterator[tuple[Batch, float]]:
        started = time.perf_counter()
        for made in pool.make(iter(orders), ahead=workers * config.prefetch, held=held):
            yield as_batch(made, ring, packed=packed, raw=layout is not None), time.perf_counter() - started
            started = time.perf_counter()

    with closing(ring), closing(WorkerPool(maker, workers, slots)) as pool:
        if on_gpu and not packed:
            ring.pin()
        yield batches(pool)
