"""The memory that a job is sure to need: what cannot fit is refused before it is tried."""

import math
from dataclasses import replace

import torch

from mgpu_ddp.config.schema import FakeConfig, dataset_range
from mgpu_ddp.data.datasets import open_samples
from mgpu_ddp.distributed.host import available_bytes, require_memory
from mgpu_ddp.inference.pipeline import held_slots
from mgpu_ddp.job.context import Setup
from mgpu_ddp.job.plan import batch_size_of
from mgpu_ddp.loader.loader import plan_slots
from mgpu_ddp.models.prepare import DTYPES
from mgpu_ddp.preprocess.transform import Transform


def require_room(setup: Setup) -> None:
    """Refuse images, batches and models that do not fit. Rank 0 only.

    Raises:
        OutOfMemoryError: names the key.
    """
    config, world, resolved = setup.job.config, setup.world, setup.resolved
    if isinstance(config.data, FakeConfig):
        # Every process that makes images has one as fp32 and one as bytes.
        one = 5 * math.prod(config.data.image_size) * max(1, resolved.workers)
        available = available_bytes() // world.local_size
        require_memory("data.image_size", list(config.data.image_size), one, available, "Lower it.")
    samples = open_samples(config, setup.files)
    start, stop = dataset_range(config, len(samples))
    # Until one is found, or where the folder has its own, the loader sees to it.
    is_known = config.batch_size != "auto" and setup.folder.before is None
    batch_size = batch_size_of(config, resolved.batch_size, len(samples)) if is_known else 1
    rows = -(-(stop - start) // world.size) if is_known else 1
    resolved = replace(resolved, batch_size=batch_size)
    transform, size_key = resolved.transform, "transform.size"
    if isinstance(transform, Transform):
        size_key = config.transform.size_key(cropped=transform.crop is not None)
    held = held_slots(resolved, world)
    plan_slots(samples, rows, config.loader, resolved, world, held=held, size_key=size_key)
    if world.device.type == "cuda":
        total, itemsize = torch.cuda.mem_get_info(world.device)[1], DTYPES[resolved.precision].itemsize
        model_bytes = sum(parameter.numel() for parameter in setup.model.module.parameters()) * itemsize
        require_memory("model.name", config.model.name, model_bytes, total, "Choose a smaller model, or fewer classes.")
        numbers = batch_size * math.prod(transform.shape)
        require_memory("batch_size", batch_size, numbers * itemsize, total, f"Lower it, or {size_key}.")
