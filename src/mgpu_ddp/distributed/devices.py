"""The device that a rank runs on."""

import os
from dataclasses import dataclass, replace

import torch

from mgpu_ddp.config.schema import Config
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The hardware that one rank has found to run on."""

    node: str
    gpus: int
    """GPUs that this process sees."""
    uuid: str
    """Identifies this rank's GPU; empty where there is none."""
    kind: str
    torch: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Devices:
    """The hardware of all ranks, as one of them sees it."""

    config: Config
    rank: int
    ranks: list[Found]
    """By rank."""

    @property
    def mine(self) -> Found:
        return self.ranks[self.rank]


def choose_device(config: Config, world: World) -> World:
    """This world on the device that `runtime.device` and `strategy` ask for. Collective: every rank calls this.

    Raises:
        UsageError: no CUDA, or not one GPU for each process.
    """
    with world.together("look for GPUs"):
        gpus = torch.cuda.device_count() if config.runtime.device != "cpu" else 0
        # SLURM may show each task its own GPU alone.
        index = world.local_rank if gpus >= world.local_size else 0
        gpu = (
            (str(torch.cuda.get_device_properties(index).uuid), torch.cuda.get_device_name(index))
            if gpus
            else ("", "cpu")
        )
    mine = [os.uname().nodename, gpus, *gpu, torch.__version__]
    ranks = [
        Found(node=node, gpus=number, uuid=uuid, kind=kind, torch=release)
        for node, number, uuid, kind, release in world.exchange("GPUs", mine)
    ]
    with world.together("choose the device"):
        check(Devices(config=config, rank=world.rank, ranks=ranks))
        if not gpus:
            return replace(world, device=torch.device("cpu"))
        torch.cuda.set_device(index)
    return replace(world, device=torch.device("cuda", index))


def check(devices: Devices) -> None:
    """Refuse devices on which the job cannot run as it is asked to.

    Raises:
        UsageError: says what this rank lacks.
    """
    for find in CHECKS:
        if mistake := find(devices):
            raise UsageError(mistake)


def _data_parallel_in_several_processes(devices: Devices) -> str | None:
    if devices.config.strategy == "ddp" or len(devices.ranks) == 1:
        return None
    number = len(devices.ranks)
    return (
        f"strategy must be ddp for {number} processes, got 'data_parallel'. Start that with python -m mgpu_ddp.infer."
    )


def _no_gpu(devices: Devices) -> str | None:
    if devices.config.runtime.device != "cuda" or devices.mine.gpus:
        return None
    return "runtime.device must be one this machine has, got 'cuda'. Use runtime.device=cpu."


def _no_gpu_here_alone(devices: Devices) -> str | None:
    if devices.mine.gpus or not any(found.gpus for found in devices.ranks):
        return None
    place = f"rank {devices.rank} of {len(devices.ranks)} ({devices.mine.node})"
    return f"{place} has no GPU, but others have. Use runtime.device=cpu, or other nodes."


def _a_gpu_for_several_ranks(devices: Devices) -> str | None:
    mine = devices.mine
    sharing = [found for found in devices.ranks if (found.node, found.uuid) == (mine.node, mine.uuid)]
    if not mine.gpus or len(sharing) == 1:
        return None
    number = sum(found.node == mine.node for found in devices.ranks)
    return (
        f"{number} processes on {mine.node} need a GPU each, and there are {mine.gpus}."
        f" Start at most {mine.gpus} there (nproc_per_node), or use runtime.device=cpu."
    )


def _unequal_devices(devices: Devices) -> str | None:
    if not devices.config.runtime.deterministic:
        return None
    first = devices.ranks[0]
    for rank, found in enumerate(devices.ranks):
        if (found.kind, found.torch) != (first.kind, first.torch):
            return (
                f"rank {rank} has {found.kind} with torch {found.torch}, but rank 0 {first.kind} with torch"
                f" {first.torch}: their rows would differ in the last bits. Use equal nodes, or"
                " runtime.deterministic=false."
            )
    return None


CHECKS = (
    _data_parallel_in_several_processes,
    _no_gpu,
    _no_gpu_here_alone,
    _a_gpu_for_several_ranks,
    _unequal_devices,
)
"""Each returns what is wrong, or None; the first message is the one that is raised."""
