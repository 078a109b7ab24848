"""Loader workers → batches: decode in parallel, pad to the batch size, keep bad samples apart."""

import ctypes
import itertools
import math
import signal
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import BatchSampler, DataLoader, Dataset

from mgpu_ddp import stores
from mgpu_ddp.arrays import ArraySamples
from mgpu_ddp.config import ArrayConfig, Config, LoaderConfig
from mgpu_ddp.datasets import Samples
from mgpu_ddp.errors import OutOfMemoryError, StateError
from mgpu_ddp.jpeg import read_header
from mgpu_ddp.keeping import available_bytes
from mgpu_ddp.preprocess import Pixels, Transform, copy_pixels
from mgpu_ddp.ring import Ring
from mgpu_ddp.sharding import ShardSampler
from mgpu_ddp.signals import leave_stopping_to_parent
from mgpu_ddp.spare import Share
from mgpu_ddp.world import World

Integers = npt.NDArray[np.int64]
COPYING_WORKERS = 4
"""That only copy images to a GPU: they fill the memory bus."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Jpegs:
    """k encoded images that are left to the GPU, int64 (k,) each.

    Image i is `lengths[i]` bytes at `addresses[i]` of this process. It belongs into row `places[i]` of the batch once
    its EXIF orientation `orientations[i]` is applied. It has `heights[i]` by `widths[i]` pixels, of which `down[i]`
    by `across[i]` share a sample of chroma, 0 by 0 in a grey image.
    """

    addresses: Integers
    lengths: Integers
    places: Integers
    orientations: Integers
    heights: Integers
    widths: Integers
    down: Integers
    across: Integers
    spilt: list[torch.Tensor]
    """Keeps what some of the addresses point to."""

    def __len__(self) -> int:
        return len(self.addresses)

    @classmethod
    def joined(cls, parts: "Sequence[Jpegs]", batch_size: int) -> "Jpegs":
        """Those of several batches, `places` in the row of all their batches."""
        integers = {
            f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls) if f.name != "spilt"
        }
        integers["places"] += np.repeat(np.arange(len(parts)) * batch_size, [len(part) for part in parts])
        return cls(**integers, spilt=[tensor for part in parts for tensor in part.spilt])

    def content(self, number: int) -> bytes:
        return ctypes.string_at(int(self.addresses[number]), int(self.lengths[number]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """n samples on their way to the model.

    `pixels`: uint8 (batch_size, height, width, 3), in memory without gaps; rows of bad samples are zeros, rows past n
    too unless there are `jpegs`, and rows of those hold nothing of meaning. `index`: int64 (n,). `label`: int32 (n,).
    `errors`: dataset index → reason. `seconds`: worker time per stage. `pixels` and `jpegs` lie in memory that is used
    again: they hold until `held` batches later.
    """

    index: npt.NDArray[np.int64]
    label: npt.NDArray[np.int32]
    pixels: torch.Tensor
    jpegs: Jpegs | None
    errors: dict[int, str]
    seconds: dict[str, float]
    raw: bool = False
    """Whether `pixels` are as the source has them, so that the transform's geometry is still to come."""
    read_bytes: int = 0
    """What its worker asked the kernel for in the meantime, as of all files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What a worker is asked for: these samples, in this slot."""

    slot: int
    indices: list[int]
    ahead: list[int] = field(default_factory=list)
    """What the same worker is asked for after these."""
    decode: int = 0
    """How many of them, from the first on, the worker decodes even where the GPU could."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """What a worker made of an order, but for the bytes in its slot."""

    slot: int
    index: npt.NDArray[np.int64]
    label: npt.NDArray[np.int32]
    errors: dict[int, str]
    seconds: dict[str, float]
    jpegs: Integers
    """(k, 8) of encoded images: first byte in the slot's room, length, and then as in `Jpegs`."""
    spilt: dict[int, bytes]
    """Encoded images that the room did not hold, by their number."""
    read_bytes: int = 0


class BatchMaker(Dataset[Made | StateError]):
    """What runs in a worker: an order in, its slot filled with one padded batch.

    A source that is not what was listed is no matter of one sample: its error comes out in the place of a batch.
    """

    def __init__(
        self, samples: Samples, transform: Transform, ring: Ring, config: LoaderConfig, *, packed: bool = False
    ) -> None:
        self._samples, self._transform, self._ring, self._config = samples, transform, ring, config
        self._packed = packed

    def __getitems__(self, order: Order) -> Made | StateError:
        before = _bytes_read()
        made = self._make(order)
        return made if isinstance(made, StateError) else replace(made, read_bytes=_bytes_read() - before)

    def _make(self, order: Order) -> Made | StateError:
        view, room = self._ring.array(order.slot), self._ring.room(order.slot).numpy()
        labels = np.full(len(order.indices), -1, dtype=np.int32)
        seconds: dict[str, float] = {}
        made = Made(
            slot=order.slot,
            index=np.asarray(order.indices, dtype=np.int64),
            label=labels,
            errors={},
            seconds=seconds,
            jpegs=np.empty((0, 8), dtype=np.int64),
            spilt={},
        )
        packed: list[tuple[int, ...]] = []

        def clock(stage: str, spent_s: float) -> None:
            seconds[stage] = seconds.get(stage, 0.0) + spent_s

        samples, indices = self._samples, order.indices
        started = time.perf_counter()
        try:
            if isinstance(samples, ArraySamples) and samples.fill(indices, self._transform, view, clock):
                view[len(indices) :] = 0
                return made
            samples.expect([*indices, *order.ahead])
        except StateError as error:
            return error
        limit = TimeLimit(self._config.timeout_s)
        with limit.installed():
            for place, index in enumerate(indices):
                try:
                    with limit:
                        data = self._samples.read(index, clock) if self._packed else None
                        to_gpu = data is not None and place >= order.decode
                        if data is not None and to_gpu and self._pack(made, packed, place, data, room):
                            labels[place] = self._samples.known_label(index)
                        else:
                            pixels, labels[place] = self._samples.load(index, self._transform, clock, data)
                            copy_pixels(pixels, view[place])
                except StateError as error:
                    return error
                except (Exception, TookTooLongError) as error:  # decoders raise all kinds; each bad image is one row
                    view[place] = 0
                    labels[place] = self._samples.known_label(index)
                    made.errors[index] = reason_of(error)
        if self._packed:
            clock("pack", time.perf_counter() - started - sum(seconds.values()))
        else:
            view[len(indices) :] = 0
        return replace(made, jpegs=np.array(packed, dtype=np.int64)) if packed else made

    def _pack(self, made: Made, packed: list[tuple[int, ...]], place: int, data: bytes, room: Pixels) -> bool:
        """Leave an image to the GPU, if it is one that the GPU decodes; what it is not sure of, Pillow judges."""
        header = read_header(data)
        if header is None or not header.plain or not self._transform.may_resize(header.width, header.height):
            return False
        if header.width * header.height > self._config.max_pixels:
            return False
        first, length = sum(packed[-1][:2]) if packed else 0, len(data)
        if first + length <= len(room):
            room[first : first + length] = np.frombuffer(data, dtype=np.uint8)
        else:
            made.spilt[len(packed)] = data
            length = 0
        where = place, header.orientation, header.height, header.width
        packed.append((first, length, *where, *header.chroma))
        return True


def as_batch(made: Made, ring: Ring, *, packed: bool = False, raw: bool = False) -> Batch:
    """A worker's batch as the rank sees it."""
    jpegs: Jpegs | None = None
    if packed:
        first, lengths, *columns = made.jpegs.T
        addresses, spilt = ring.room(made.slot).data_ptr() + first, []
        for number, data in made.spilt.items():
            spilt.append(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            addresses[number], lengths[number] = spilt[-1].data_ptr(), len(data)
        names = ("places", "orientations", "heights", "widths", "down", "across")
        jpegs = Jpegs(addresses=addresses, lengths=lengths, **dict(zip(names, columns, strict=True)), spilt=spilt)
    return Batch(
        index=made.index,
        label=made.label,
        pixels=ring.pixels(made.slot),
        jpegs=jpegs,
        errors=made.errors,
        seconds=made.seconds,
        raw=raw,
        read_bytes=made.read_bytes,
    )


class Orders:
    """A sampler's indices in batches, each with the slot it goes to."""

    def __init__(
        self, sampler: ShardSampler, batch_size: int, slots: int, workers: int, share: Share | None = None
    ) -> None:
        self._batches, self._slots = BatchSampler(sampler, batch_size, drop_last=False), slots
        self._stride, self._share = max(workers, 1), share

    def __iter__(self) -> Iterator[Order]:
        # Workers are asked in turn.
        batches, later = itertools.tee(self._batches)
        ahead = itertools.chain(itertools.islice(later, self._stride, None), itertools.repeat([]))
        for number, (indices, then) in enumerate(zip(batches, ahead, strict=False)):
            decode = 0
            if self._share:
                if number and number % self._slots == 0:
                    self._share.adjust()
                decode = int(self._share.now * len(indices))
            yield Order(slot=number % self._slots, indices=indices, ahead=then, decode=decode)

    def __len__(self) -> int:
        return len(self._batches)


def _bytes_read() -> int:
    """All that this process has read of files so far, from the kernel's page cache or not. Source: proc(5)."""
    asked = int(Path("/proc/self/io").read_bytes().split(b"\n", 1)[0].partition(b":")[2])
    # Sockets are read in ways that the kernel does not count there.
    return asked + stores.received_bytes()


class TookTooLongError(BaseException):
    """A sample's time is over. No Exception, so that no decoder's own `except Exception` can swallow it."""


def reason_of(error: BaseException) -> str:
    """Why a sample has no prediction, in words, without the path: the row carries that."""
    if isinstance(error, UnidentifiedImageError):
        return "UnidentifiedImageError: empty, or not an image in an allowed format"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    kind = TimeoutError if isinstance(error, TookTooLongError) else type(error)
    return " ".join(f"{kind.__name__}: {text}".split())[:500]


class TimeLimit:
    """Raises in a `with` block of it once that has taken too long (a stuck network mount, say), while `installed`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Once for many blocks: it takes as long as to read a file."""
        before = signal.signal(signal.SIGALRM, self._ring)
        try:
            yield
        finally:
            signal.signal(signal.SIGALRM, before)

    def _ring(self, _number: int, _frame: FrameType | None) -> None:
        raise TookTooLongError(f"took longer than loader.timeout_s={self._seconds:g}")

    def __enter__(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, self._seconds)

    def __exit__(self, *_raised: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _start_worker(_number: int) -> None:
    leave_stopping_to_parent()
    torch.set_num_threads(1)


def num_workers(config: Config, world: World) -> int:
    """`loader.workers` with auto decided: the CPUs this process may use, shared among the ranks of its host."""
    if config.loader.workers != "auto":
        return int(config.loader.workers)
    # More would only make more slots, and each costs time when it is touched and pinned for the first time.
    copies = isinstance(config.data, ArrayConfig) and world.device.type == "cuda"
    return min(world.share_of_cpus, COPYING_WORKERS) if copies else world.share_of_cpus


@contextmanager
def naming_dead_workers() -> Iterator[None]:
    """Say in one line that a loader worker died, wherever the block is when torch's SIGCHLD handler raises."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        first = str(error).splitlines()[0].strip()
        raise StateError(f"loader workers must live, got: {first} Look for what killed it; lack of memory?") from error


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
) -> Generator[tuple[Batch, float]]:
    """This rank's samples in order, read ahead of the model; each batch with the seconds its consumer waited.

    `config.workers` must be a number. With `packed`, images that a GPU can decode stay encoded, all but the `share` of
    them that is for the workers. `held` is how many batches the consumer may keep.
    """
    workers = int(config.workers)
    # A worker is asked for a batch once the one `workers * prefetch` before it was handed out.
    slots = _multiple(workers * config.prefetch + held, max(workers, 1))
    # A short job uses none of them again.
    slots = max(1, min(slots, -(-len(sampler) // batch_size)))
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
    # Forked workers start at once and inherit what is imported; a spawned one would import torch again for seconds.
    ahead: dict[str, Any] = {
        "prefetch_factor": config.prefetch,
        "worker_init_fn": _start_worker,
        "multiprocessing_context": "fork",
    }
    loader = DataLoader(
        BatchMaker(samples, transform, ring, config, packed=packed),
        batch_sampler=Orders(sampler, batch_size, slots, workers, share),  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_as_made,
        **(ahead if workers else {}),
    )
    with warnings.catch_warnings():
        # Workers are forked beside the pulse thread: they use neither its store client nor CUDA nor gloo.
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork.*", category=DeprecationWarning)
        started = time.perf_counter()
        batches = iter(loader)
    if on_gpu and not packed:
        ring.pin()
    try:
        for made in batches:
            if isinstance(made, StateError):
                raise made
            yield as_batch(made, ring, packed=packed, raw=layout is not None), time.perf_counter() - started
            started = time.perf_counter()
    finally:
        # Ends the workers now, and not when the garbage collector comes by.
        del batches
        ring.close()


def _multiple(at_least: int, of: int) -> int:
    """Slots that each worker has for itself: it touches fewer pages for the first time."""
    return -(-at_least // of) * of


def _as_made(made: Any) -> Made | StateError:
    assert isinstance(made, Made | StateError)
    return made
