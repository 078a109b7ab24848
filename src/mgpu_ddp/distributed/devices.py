"""Which device a rank runs on."""

import os
from dataclasses import replace

import torch

from mgpu_ddp.config.schema import Config
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import UsageError


def choose_device(config: Config, world: World) -> World:
    """This world on the device that `runtime.device` and `strategy` ask for. Collective: every rank calls this.

    Raises:
        UsageError: no CUDA, or not one GPU for each process.
    """
    wanted, gpus, index, gpu, kind = config.runtime.device, 0, 0, "", "cpu"
    with world.together("look for GPUs"):
        gpus = torch.cuda.device_count() if wanted != "cpu" else 0
        if gpus:
            # SLURM may show each task its own GPU alone.
            index = world.local_rank if gpus >= world.local_size else 0
            gpu = f"{os.uname().nodename} {torch.cuda.get_device_properties(index).uuid}"
            kind = torch.cuda.get_device_name(index)
    found = world.exchange("GPUs", [gpu, kind, torch.__version__])
    uuids = [uuid for uuid, _, _ in found]
    with world.together("choose the device"):
        if config.strategy == "data_parallel" and world.size > 1:
            raise UsageError(
                f"strategy must be ddp for {world.size} processes, got 'data_parallel'."
                " Start that with python -m mgpu_ddp.infer."
            )
        if wanted == "cuda" and not gpus:
            raise UsageError("runtime.device must be one this machine has, got 'cuda'. Use runtime.device=cpu.")
        if any(uuids) and not gpus:
            raise UsageError(
                f"runtime.device must be one that every rank has, got no GPU on rank {world.rank} of {world.size}"
                f" ({os.uname().nodename}). Use runtime.device=cpu, or other nodes."
            )
        if gpus and uuids.count(gpu) > 1:
            raise UsageError(
                f"nproc_per_node must be at most {gpus}, the GPUs of this host, got {world.local_size} on rank"
                f" {world.rank} of {world.size}. Start fewer processes or use runtime.device=cpu."
            )
        other = next((rank for rank, its in enumerate(found) if its[1:] != found[0][1:]), None)
        if other is not None and config.runtime.deterministic:
            raise UsageError(
                f"runtime.device must be of one model and one torch for the same bits on all ranks, got"
                f" {' with torch '.join(found[0][1:])} on rank 0 and {' with torch '.join(found[other][1:])} on rank"
                f" {other}. Use equal nodes, or runtime.deterministic=false."
            )
        if not gpus:
            return replace(world, device=torch.device("cpu"))
        torch.cuda.set_device(index)
    return replace(world, device=torch.device("cuda", index))
