"""Ranks, their devices and how they talk: the only caller of torch.distributed.

One process group per process, opened by `join()` outside Hydra for all jobs of a sweep. Two ways to talk:
small JSON values through the launcher's store (`exchange`, `share`, `together`), and windows through
`all_gather_object` on a gloo group of their own (`Channel`). Neither ever waits for a rank that is
dead: each rank's `Pulse` thread beats once a second, rank 0 watches all beats, and every wait looks at that.
"""

import itertools
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from mgpu_ddp import slurm
from mgpu_ddp.config import Config
from mgpu_ddp.errors import MgpuError, PeerError, PeerFailedError, PeerLostError, ProtocolError, UsageError
from mgpu_ddp.pulse import BEAT_S, Pulse

POLL_S = 0.05
RANKS_PER_POLL = 256
"""That may ask a store so often: beyond, each asks less often, or the store would do nothing but answer."""
NAMING_S = 5.0
"""How long a rank that knows of a loss waits to hear who it was."""
CONNECTIONS = 32
"""Of a process to its GPU, the most there are. Streams that share one wait for each other's kernels, and nvJPEG has
many of its own: with 8, CUDA's default, it decodes a fifth less while a model runs, with 1, as containers for training
have it, four fifths. Source: CUDA C++ Programming Guide, CUDA_DEVICE_MAX_CONNECTIONS."""


@dataclass(slots=True)
class Link:
    """What a world holds open: its stores, its pulse, and how many exchanges it has had."""

    launch: Store
    """Lives as long as the launcher: across restarts of the workers."""
    store: Store
    """Of this attempt alone: a restarted worker must not read what a dead attempt wrote."""
    pulse: Pulse
    turn: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Where this process stands among its peers."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    cpus: frozenset[int]
    """That this process may use."""
    share_of_cpus: int
    """How many of them are for this rank: the ranks of its host share them."""
    attempt: int
    device: torch.device
    link: Link = field(repr=False, compare=False)

    @property
    def pulse(self) -> Pulse:
        return self.link.pulse

    def exchange(self, topic: str, value: Any) -> list[Any]:
        """Give every rank the JSON values of all ranks. Collective: every rank calls this.

        Rank 0 reads all and publishes the list, so the store carries O(size) messages; equal neighbours count once.

        Raises:
            PeerLostError: a rank fell silent.
            ProtocolError: ranks are at different topics.
        """
        key, self.link.turn = f"exchange/{self.link.turn}", self.link.turn + 1
        store = self.link.store
        with _store_must_answer():
            store.set(f"{key}/{self.rank}", json.dumps([topic, value]))
            if self.rank == 0:
                parts = [f"{key}/{rank}" for rank in range(self.size)]
                _await(store, parts, self.pulse)
                equal = [(len(list(run)), part.decode()) for part, run in itertools.groupby(store.multi_get(parts))]
                store.set(f"{key}/all", "[" + ",".join(f"[{count},{part}]" for count, part in equal) + "]")
            _await(store, [f"{key}/all"], self.pulse)
            heard = [part for count, part in json.loads(store.get(f"{key}/all")) for _ in range(count)]
        topics = sorted({other for other, _ in heard})
        if topics != [topic]:
            raise ProtocolError(f"all ranks must be at {topic!r}, got {topics} on rank {self.rank} of {self.size}.")
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
        self.pulse.progress["at"] = topic
        error: Exception | None = None
        try:
            yield
        except PeerLostError:
            raise
        except Exception as raised:
            error = raised
        mine = None if error is None else [type(error).__name__, str(error), isinstance(error, UsageError)]
        outcomes = self.exchange(topic, mine)
        if error is not None:
            raise error
        for rank, outcome in enumerate(outcomes):
            if outcome is not None:
                name, text, is_usage = outcome
                raise (
                    UsageError(text)
                    if is_usage
                    else PeerFailedError(f"rank {rank} of {self.size} raised {name}: {text}")
                )

    def raise_alarm(self, job: str, text: str) -> None:
        """Have every rank see within a beat that this job cannot go on."""
        with _store_must_answer():
            self.link.store.set(f"alarm/{job}", text)

    def first_of_launch(self, key: str, value: str) -> str:
        """What this launch first gave a key: a restarted attempt hears what the dead one chose. Rank 0 only."""
        return bytes(self.link.launch.compare_set(f"first/{key}", "", value)).decode()

    def is_done(self, key: str) -> bool:
        """Whether this launch, or an attempt of it that is dead by now, has marked a key. Rank 0 only."""
        return bool(self.link.launch.add(f"done/{key}", 0) > 0)

    def mark_done(self, key: str) -> None:
        """Mark a key for the rest of this launch. Rank 0 only."""
        self.link.launch.add(f"done/{key}", 1)


def _await(store: Store, keys: list[str], pulse: Pulse) -> None:
    """Wait until the keys are there, as long as every rank lives."""
    # Asking again rather than `store.wait`: each time that runs into its timeout, torch prints a warning.
    pause_s, longest_s = 0.001, POLL_S * max(1, pulse.size / RANKS_PER_POLL)
    while not store.check(keys):
        pulse.check()
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, longest_s)


@contextmanager
def _store_must_answer() -> Iterator[None]:
    """Take a store that is gone for what it is: the process that hosts it died, rank 0 or the launcher."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError(f"the store on rank 0 must answer, got: {str(error).splitlines()[0]}") from error


class Channel:
    """A gloo group and a store client for one job's gathering thread and nobody else.

    Two threads on one group corrupt each other's messages. Collective: every rank opens and closes it.
    """

    def __init__(self, world: World, job: str, timeout_s: float) -> None:
        self._pulse, self._size, self._rank = world.pulse, world.size, world.rank
        self._store = PrefixStore(f"channel/{job}", world.link.store.clone())
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def gather(self, window: int, payload: Any) -> list[Any]:
        """Give every rank the payloads of all ranks for one window.

        The collective starts only once every rank has posted the window, so a slow rank is waited for while it
        lives and none is ever stuck inside the collective for it.

        Raises:
            PeerLostError: a rank died or fell silent.
        """
        with _store_must_answer():
            if self._store.add(f"posted/{window}", 1) == self._size:
                self._store.set(f"go/{window}", "1")
                # Whoever posted this window has left the one before.
                for key in (f"posted/{window - 1}", f"go/{window - 1}"):
                    self._store.delete_key(key)
            _await(self._store, [f"go/{window}"], self._pulse)
        payloads: list[Any] = [None] * self._size
        with self._naming_lost(window):
            dist.all_gather_object(payloads, payload, group=self._group)
        return payloads

    def gather_on_first(self, window: int, value: Any) -> list[Any] | None:
        """Give rank 0 the values of all ranks, right after they have gathered the window: what is large.

        Raises:
            PeerLostError: a rank died.
        """
        values: list[Any] | None = [None] * self._size if self._rank == 0 else None
        with self._naming_lost(window):
            dist.gather_object(value, values, dst=0, group=self._group)
        return values

    @contextmanager
    def _naming_lost(self, window: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            first = str(error).splitlines()[0].partition(". ")[0]
            # The pulse can say who it was: at once of a process that is gone, soon of one that hangs.
            self._pulse.wait_for_lost(NAMING_S if "Timed out" in first else BEAT_S)
            raise PeerLostError(f"a rank was lost while gathering window {window} ({first})") from error

    def close(self) -> None:
        dist.destroy_process_group(self._group)


def join() -> World:
    """Enter the world: torchrun's, srun's, or one process alone. Collective: every rank calls this, once per process.

    Raises:
        UsageError: SLURM does not say where the first task runs.
    """
    # Before the first thread: it changes what others may be reading.
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = str(CONNECTIONS)
    task = slurm.read_task()
    if task is not None:
        address, port = task.master
        found = {"RANK": task.rank, "WORLD_SIZE": task.size, "MASTER_ADDR": address, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in found.items()}
        os.environ |= {"LOCAL_RANK": str(task.local_rank), "LOCAL_WORLD_SIZE": str(task.local_size)}
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    launch: Store
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        launch, rank, size = next(iter(rendezvous("env://")))
    else:
        launch, rank, size = HashStore(), 0, 1
    # A restarted worker would read the dead attempt's addresses from the agent's store: one prefix per attempt.
    store = PrefixStore(f"mgpu_ddp/attempt/{attempt}", launch)
    pulse = Pulse(store.clone(), rank, size)
    dist.init_process_group("gloo", store=PrefixStore("group", store), rank=rank, world_size=size)
    pulse.start()
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cpus = frozenset(os.sched_getaffinity(0))
    # On a cluster that does not bind its jobs to CPUs, every process may use those of all jobs.
    allowed = min(len(cpus), int(os.environ.get("SLURM_CPUS_ON_NODE", len(cpus))))
    return World(
        rank=rank,
        size=size,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        local_size=local_size,
        cpus=cpus,
        share_of_cpus=max(1, allowed // local_size) if task is None else min(len(cpus), task.cpus),
        attempt=attempt,
        device=torch.device("cpu"),
        link=Link(launch=PrefixStore("mgpu_ddp/launch", launch), store=store, pulse=pulse),
    )


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


def leave(world: World) -> None:
    """End the process group. Collective: every rank calls this, on the success path only."""
    world.exchange("leave", None)
    if world.rank != 0:
        world.pulse.end()
    # Without torchrun rank 0 hosts the store, in which the others have yet to read that all leave: it goes last.
    with _store_must_answer():
        world.link.store.set(f"left/{world.rank}", "")
        if world.rank == 0:
            _await(world.link.store, [f"left/{rank}" for rank in range(world.size)], world.pulse)
    world.pulse.end()
    dist.destroy_process_group()


def share_weights(module: nn.Module) -> nn.Module:
    """Give every rank rank 0's parameters and buffers, by DDP's construction. Collective: every rank calls this.

    DDP's defaults matter: `broadcast_buffers=False` would leave the BatchNorm statistics of the other ranks as
    they were. The bare module comes back because DDP's own forward broadcasts buffers at every step, which
    hangs ranks with uneven shards.
    """
    module.requires_grad_(True)
    shared: nn.Module = DistributedDataParallel(module).module
    return shared.requires_grad_(False)


def reason_of(error: BaseException) -> str:
    """One line that names an error."""
    text = " ".join(str(error).split())
    return (
        text if isinstance(error, MgpuError) and not isinstance(error, PeerError) else f"{type(error).__name__}: {text}"
    )
