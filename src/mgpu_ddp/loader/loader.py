"""Loader workers → batches, in order, in memory that is used again."""

import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

from PIL import Image
from torch.utils.data import BatchSampler

from mgpu_ddp.config.resolved import Resolved
from mgpu_ddp.config.schema import ArrayConfig, Config, LoaderConfig
from mgpu_ddp.data.samples import Samples
from mgpu_ddp.distributed.host import available_bytes
from mgpu_ddp.distributed.sharding import ShardSampler
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import OutOfMemoryError
from mgpu_ddp.loader.batch import Batch, as_batch
from mgpu_ddp.loader.shared_slots import Ring
from mgpu_ddp.loader.worker import BatchMaker, Order
from mgpu_ddp.loader.worker_pool import WorkerPool

COPYING_WORKERS = 4
"""That only copy images to a GPU: they fill the memory bus."""


def num_workers(config: Config, world: World) -> int:
    """`loader.workers` with auto decided: the CPUs this process may use, shared among the ranks of its host."""
    if config.loader.workers != "auto":
        return int(config.loader.workers)
    # More would only make more slots, and each costs time when it is touched and pinned for the first time.
    copies = isinstance(config.data, ArrayConfig) and world.device.type == "cuda"
    return min(world.share_of_cpus, COPYING_WORKERS) if copies else world.share_of_cpus


@contextmanager
def load_batches(
    samples: Samples, sampler: ShardSampler, config: LoaderConfig, resolved: Resolved, world: World, *, held: int
) -> Iterator[Iterator[tuple[Batch, float]]]:
    """This rank's samples in order, read ahead of the model; each batch with the seconds its consumer waited.

    What made them is put away with the block, not after the last batch, which would keep those before it waiting.
    Images that a GPU decodes stay encoded. `held` is how many batches the consumer may keep.
    """
    workers, batch_size, transform = resolved.workers, resolved.batch_size, resolved.transform
    packed = resolved.decode != "cpu"
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
    orders = (Order(indices=indices) for indices in BatchSampler(sampler, batch_size, drop_last=False))

    def batches(pool: WorkerPool) -> Iterator[tuple[Batch, float]]:
        started = time.perf_counter()
        for made in pool.make(orders, ahead=workers * config.prefetch, held=held):
            yield as_batch(made, ring, packed=packed, raw=layout is not None), time.perf_counter() - started
            started = time.perf_counter()

    with closing(ring), closing(WorkerPool(maker, workers, slots)) as pool:
        if on_gpu and not packed:
            ring.pin()
        yield batches(pool)
