"""All samples of a source through the loader, as the model would get them."""

from dataclasses import dataclass, field
from typing import Any

import torch

from mgpu_ddp.config.schema import LoaderConfig
from mgpu_ddp.data.samples import Samples
from mgpu_ddp.distributed.sharding import Plan, ShardSampler
from mgpu_ddp.distributed.world import World
from mgpu_ddp.loader.loader import load_batches
from mgpu_ddp.preprocess.transform import plain
from tests.support.choices import resolved


@dataclass(kw_only=True)
class Loaded:
    """The content of the batches of all ranks, one rank after another."""

    index: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)
    pixels: list[torch.Tensor] = field(default_factory=list)
    read_bytes: int = 0


def load_all(samples: Samples, world: World, *, workers: int = 2, size: int = 1, block: int = 1) -> Loaded:
    """Load every sample, as `size` ranks would that share them in blocks."""
    plan: dict[str, Any] = {"start": 0, "stop": len(samples), "size": size, "block": block, "contiguous": False}
    rows = Plan(**plan, batch_size=4, smallest_rows=len(samples), largest_rows=len(samples))
    choices = resolved(workers=workers, batch_size=4, transform=plain(16))
    found = Loaded()
    for rank in range(size):
        with load_batches(samples, ShardSampler(rows, rank), LoaderConfig(), choices, world, held=1) as batches:
            for batch in batches:
                found.index += batch.index.tolist()
                found.labels += batch.label.tolist()
                found.errors |= batch.errors
                found.pixels += batch.pixels[: len(batch.index)].clone()
                found.read_bytes += batch.read_bytes
    return found
