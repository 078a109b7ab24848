"""What runs in a loader worker: an order in, its slot of the ring filled with one padded batch.

Bad samples are kept apart. What a GPU's decoder is to have is only looked through and packed.
"""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import numpy as np
import numpy.typing as npt
import torch
from PIL import UnidentifiedImageError

from mgpu_ddp.config.schema import LoaderConfig
from mgpu_ddp.data import object_store
from mgpu_ddp.data.samples import Samples
from mgpu_ddp.distributed.signals import leave_stopping_to_parent
from mgpu_ddp.errors import StateError
from mgpu_ddp.loader.shared_slots import Ring
from mgpu_ddp.preprocess.jpeg_header import read_header
from mgpu_ddp.preprocess.transform import Pixels, Transform, copy_pixels

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What a worker is asked for: these samples, in this slot."""

    indices: list[int]
    slot: int = 0


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


class BatchMaker:
    """What runs in a worker: an order in, its slot filled with one padded batch."""

    def __init__(
        self, samples: Samples, transform: Transform, ring: Ring, config: LoaderConfig, *, packed: bool = False
    ) -> None:
        self._samples, self._transform, self._ring, self._config = samples, transform, ring, config
        self._packed = packed

    @property
    def looks_ahead(self) -> bool:
        """It is worth telling what will be asked for next, at the price that no other worker takes it."""
        return self._samples.looks_ahead

    def make(self, order: Order, then: Sequence[int] = ()) -> Made:
        """Fill the slot; `then` is what will be asked for next.

        Raises:
            StateError: the source is not what was listed, which is no matter of one sample.
        """
        before = _bytes_read()
        made = self._make(order, then)
        return replace(made, read_bytes=_bytes_read() - before)

    def _make(self, order: Order, then: Sequence[int]) -> Made:
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
        if samples.fill(indices, self._transform, view, clock):
            view[len(indices) :] = 0
            return made
        samples.expect([*indices, *then])
        limit = TimeLimit(self._config.timeout_s)
        with limit.installed():
            for place, index in enumerate(indices):
                try:
                    with limit:
                        data = self._samples.read(index, clock) if self._packed else None
                        if data is not None and self._pack(made, packed, place, data, room):
                            labels[place] = self._samples.known_label(index)
                        else:
                            pixels, labels[place] = self._samples.load(index, self._transform, clock, data)
                            copy_pixels(pixels, view[place])
                except StateError:
                    raise
                except (Exception, TookTooLongError) as error:  # decoders raise all kinds; each bad image is one row
                    view[place] = 0
                    labels[place] = self._samples.known_label(index)
                    made.errors[index] = row_error(error)
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


def _bytes_read() -> int:
    """All that this process has read of files so far, from the kernel's page cache or not. Source: proc(5)."""
    asked = int(Path("/proc/self/io").read_bytes().split(b"\n", 1)[0].partition(b":")[2])
    # Sockets are read in ways that the kernel does not count there.
    return asked + object_store.received_bytes()


class TookTooLongError(BaseException):
    """A sample's time is over. No Exception, so that no decoder's own `except Exception` can swallow it."""


def row_error(error: BaseException) -> str:
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


def start_worker() -> None:
    leave_stopping_to_parent()
    torch.set_num_threads(1)
