"""The world of ranks, and how they exchange small values. No package but this one calls torch.distributed.

One process group per process, opened by `join()` outside Hydra for all jobs of a sweep. Two ways to talk:
small JSON values through the launcher's store (`exchange`, `share`, `together`), and windows through
`all_gather_object` on a gloo group of their own (`Channel`). Neither ever waits for a rank that is
dead: each rank's `Heartbeat` thread beats once a second, rank 0 watches all beats, and every wait looks at that.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from mgpu_ddp.distributed import slurm, torchrun_env
from mgpu_ddp.distributed.heartbeat import Heartbeat
from mgpu_ddp.distributed.place import Place
from mgpu_ddp.distributed.store import store_must_answer, wait_for_keys
from mgpu_ddp.errors import PeerFailedError, PeerLostError, ProtocolError, UsageError, kind_of, words_past

CONNECTIONS = 32
"""Connections of a process to its GPU, the most there are. Streams that share one wait for each other's kernels, and
nvJPEG has many of its own: with 8, CUDA's default, it decodes a fifth less while a model runs, with 1, as containers
for training have it, four fifths. Source: CUDA C++ Programming Guide, CUDA_DEVICE_MAX_CONNECTIONS."""
WAYS = (slurm.read_place, torchrun_env.read_place)
"""The ways in which ranks are started; a process that was started in none of them is alone."""


@dataclass(slots=True)
class Link:
    """The open ends of a world: its stores, its heartbeat, and how many exchanges it has had."""

    launch: Store
    """Lives as long as the launcher: across restarts of the workers."""
    store: Store
    """Belongs to this attempt alone: a restarted worker must not read what a dead attempt wrote."""
    heartbeat: Heartbeat
    turn: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Where this process stands among its peers."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    cpus: frozenset[int]
    """CPUs that this process may use."""
    share_of_cpus: int
    """Number of CPUs for this rank: the ranks of its host share them."""
    attempt: int
    device: torch.device
    link: Link = field(repr=False, compare=False)

    @property
    def heartbeat(self) -> Heartbeat:
        return self.link.heartbeat

    def exchange(self, topic: str, value: Any) -> list[Any]:
        """Give every rank the JSON values of all ranks. Collective: every rank calls this.

        Rank 0 reads all and publishes the list, so the store carries O(size) messages; equal neighbours count once.

        Raises:
            PeerLostError: a rank fell silent.
            ProtocolError: ranks are at different topics.
        """
        key, self.link.turn = f"exchange/{self.link.turn}", self.link.turn + 1
        store = self.link.store
        with store_must_answer():
            store.set(f"{key}/{self.rank}", json.dumps([topic, value]))
            if self.rank == 0:
                parts = [f"{key}/{rank}" for rank in range(self.size)]
                wait_for_keys(store, parts, self.heartbeat)
                equal = [(len(list(run)), part.decode()) for part, run in itertools.groupby(store.multi_get(parts))]
                store.set(f"{key}/all", "[" + ",".join(f"[{count},{part}]" for count, part in equal) + "]")
            wait_for_keys(store, [f"{key}/all"], self.heartbeat)
            heard = [part for count, part in json.loads(store.get(f"{key}/all")) for _ in range(count)]
        topics = sorted({other for other, _ in heard})
        if topics != [topic]:
            raise ProtocolError(f"rank {self.rank} of {self.size} is at {topic!r}, but the ranks are at {topics}")
        return [value for _, value in heard]

    def share(self, topic: str, value: Any) -> Any:
        """Give every rank rank 0's JSON value. Collective: every rank calls this."""
        return self.exchange(topic, value if self.rank == 0 else None)[0]

    @contextmanager
    def together(self, topic: str) -> Iterator[None]:
        """Make a block succeed on all ranks or raise on all. Collective: every rank calls this.

        A rank that raised raises again; the others raise `PeerFailedError` that names it, or the same
        `UsageError` where the mistake was the user's.
        """
        self.heartbeat.progress["at"] = topic
        error: Exception | None = None
        try:
            yield
        except PeerLostError:
            raise
        except Exception as raised:
            error = raised
        is_usage = isinstance(error, UsageError)
        mine = None if error is None else [type(error).__name__, str(error), is_usage, words_past(error)]
        outcomes = self.exchange(topic, mine)
        if error is not None:
            raise error
        for rank, outcome in enumerate(outcomes):
            if outcome is not None:
                name, text, is_usage, words = outcome
                if is_usage:
                    raise UsageError(text)
                told = f"rank {rank} of {self.size} raised {name}: {' '.join(text.split())}"
                raise PeerFailedError(told, tuple(words))

    def raise_alarm(self, job: str, text: str) -> None:
        """Have every rank see within a beat that this job cannot go on."""
        with store_must_answer():
            self.link.store.set(f"alarm/{job}", text)

    def first_of_launch(self, key: str, value: str) -> str:
        """Give a key this value unless this launch has given it one, and return that. Rank 0 only.

        A restarted attempt so hears what the dead one chose.
        """
        return bytes(self.link.launch.compare_set(f"first/{key}", "", value)).decode()

    def stands_in_for_rank_0(self, error: PeerLostError) -> bool:
        """Tell whether rank 0 is the one that is lost, and this rank speaks in its place: one of the others does."""
        if self.rank == 0 or not any("rank 0" in said for said in (str(error), self.heartbeat.lost or "")):
            return False
        try:
            return bool(self.link.store.add("stands in for rank 0", 1) == 1)
        except RuntimeError:
            # The store was rank 0's own.
            return self.rank == 1

    def is_done(self, key: str) -> bool:
        """Tell whether this launch has marked a key, in this attempt or in one before. Rank 0 only."""
        return bool(self.link.launch.add(f"done/{key}", 0) > 0)

    def mark_done(self, key: str) -> None:
        """Mark a key for the rest of this launch. Rank 0 only."""
        self.link.launch.add(f"done/{key}", 1)


def join() -> World:
    """Enter the world: torchrun's, srun's, or one process alone. Collective: every rank calls this, once per process.

    Raises:
        UsageError: the environment is half set, or SLURM does not say where the first task runs.
    """
    # Before the first thread: it changes what others may be reading.
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = str(CONNECTIONS)
    place = next((place for read in WAYS if (place := read(os.environ))), Place())
    launch: Store = HashStore()
    if place.master is not None:
        address, port = place.master
        os.environ |= {"RANK": str(place.rank), "WORLD_SIZE": str(place.size)}
        os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        launch, *_ = next(iter(rendezvous("env://")))
    # A restarted worker would read the dead attempt's addresses from the agent's store: one prefix per attempt.
    store = PrefixStore(f"mgpu_ddp/attempt/{place.attempt}", launch)
    heartbeat = Heartbeat(store.clone(), place.rank, place.size)
    dist.init_process_group("gloo", store=PrefixStore("group", store), rank=place.rank, world_size=place.size)
    heartbeat.start()
    cpus = frozenset(os.sched_getaffinity(0))
    # On a cluster that does not bind its jobs to CPUs, every process may use those of all jobs.
    allowed = min(len(cpus), slurm.cpus_of_node(os.environ) or len(cpus))
    return World(
        rank=place.rank,
        size=place.size,
        local_rank=place.local_rank,
        local_size=place.local_size,
        cpus=cpus,
        share_of_cpus=min(len(cpus), place.cpus or max(1, allowed // place.local_size)),
        attempt=place.attempt,
        device=torch.device("cpu"),
        link=Link(launch=PrefixStore("mgpu_ddp/launch", launch), store=store, heartbeat=heartbeat),
    )


def leave(world: World) -> None:
    """End the process group. Collective: every rank calls this, on the success path only."""
    world.exchange("leave", None)
    if world.rank != 0:
        world.heartbeat.end()
    # Without torchrun rank 0 hosts the store, in which the others have yet to read that all leave: it goes last.
    with store_must_answer():
        world.link.store.set(f"left/{world.rank}", "")
        if world.rank == 0:
            wait_for_keys(world.link.store, [f"left/{rank}" for rank in range(world.size)], world.heartbeat)
    world.heartbeat.end()
    dist.destroy_process_group()


def share_weights(module: nn.Module, world: World) -> None:
    """Give every rank rank 0's parameters and buffers, as constructing DDP would. Collective: every rank calls this.

    DDP itself would import torch._dynamo, and its forward broadcasts buffers at every step, which hangs ranks with
    uneven shards.

    Raises:
        UsageError: the module is not the same on all ranks; names the parameter or the layer, and the rank.
    """
    if world.size == 1:
        return
    tensors = {
        name: tensor.detach() for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers())
    }
    shapes = {name: kind_of(tensor) for name, tensor in tensors.items()}
    shapes |= {name or "the module": type(part).__qualname__ for name, part in module.named_modules()}
    digests = world.exchange("weights", hashlib.sha256(json.dumps(shapes).encode()).hexdigest())
    if len(set(digests)) > 1:
        _refuse_different_models(world.exchange("shapes of the weights", shapes))
    for tensor in tensors.values():
        received = tensor.contiguous()
        dist.broadcast(received, src=0)
        tensor.copy_(received)


def _refuse_different_models(everybodys: list[dict[str, str]]) -> None:
    first = everybodys[0]
    for rank, shapes in enumerate(everybodys):
        for name in [*first, *shapes]:
            mine, other = first.get(name, "nothing"), shapes.get(name, "nothing")
            if mine != other:
                raise UsageError(
                    f"model must be the same on all ranks, got {name} as {mine} on rank 0 and {other} on rank {rank}."
                    " Build it from the same code everywhere."
                )
    raise UsageError("model must have its parameters in the same order on all ranks. Build it alike everywhere.")
