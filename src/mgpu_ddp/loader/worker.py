"""The work of a loader worker: an order comes in, and its slot is filled with one padded batch or a piece of one.

A bad sample costs its own row alone. What a GPU decodes is only looked through and packed.
"""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
from mgpu_ddp.errors import StateError, UsageError
from mgpu_ddp.loader.jpegs import JpegPacker, PackedJpegs
from mgpu_ddp.loader.shared_slots import SharedSlots
from mgpu_ddp.preprocess.jpeg_header import Header, read_header
from mgpu_ddp.preprocess.transform import AnyTransform, Integers, Pixels, Window, copy_pixels


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """A request to a worker: these samples, in this slot."""

    indices: list[int]
    slot: int = 0
    hung: dict[int, str] = field(default_factory=dict)
    """Dataset index → reason of samples that are not tried again."""
    row_by_row: bool = False
    """Show at which sample it is, rather than fill the slot at once."""
    is_last: bool = True
    """The batch ends with these samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """A worker's answer to an order, except for the bytes in its slot."""

    slot: int
    index: Integers
    label: npt.NDArray[np.int32]
    errors: dict[int, str]
    seconds: dict[str, float]
    jpegs: PackedJpegs | None = None
    read_bytes: int = 0
    carried: dict[str, npt.NDArray[np.generic]] = field(default_factory=dict)
    clipped: int = 0
    """Boxes that reached beyond their image."""
    encoded_bytes: int = 0
    """In the slot's room."""
    is_last: bool = True
    rest: Order | None = None
    """The rest of the order, because the slot is full of encoded images."""

    def clock(self, stage: str, spent_s: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + spent_s


class BatchMaker:
    """Fills slots with batches, in a worker or, without workers, in the rank itself.

    With `packed`, plain JPEGs stay encoded in the slot's room.
    """

    def __init__(
        self,
        samples: Samples,
        transform: AnyTransform,
        slots: SharedSlots,
        config: LoaderConfig,
        *,
        packed: bool = False,
    ) -> None:
        self._samples, self._transform, self._slots, self._config = samples, transform, slots, config
        self._packed = packed
        self._last_data: bytes | None = None
        self._last_header: Header | None = None

    @property
    def timeout_s(self) -> float:
        """After so long a sample is given up, unless something keeps this from running."""
        return self._config.timeout_s

    @property
    def looks_ahead(self) -> bool:
        """It is worth telling `make` what comes next, at the price that no other worker takes it."""
        return self._samples.looks_ahead

    def make(self, order: Order, then: Sequence[int] = (), at: Integers | None = None) -> Made:
        """Fill the slot; `then` is what will be asked for next. At each sample, the number in `at` goes up by one.

        Where encoded images fill the slot before the last sample, the rest is to be ordered again.

        Raises:
            StateError: the source is not what was listed, which concerns more than one sample.
        """
        read_before, num_rows, rest = _bytes_read(), len(order.indices), None
        made = Made(
            slot=order.slot,
            index=np.asarray(order.indices, dtype=np.int64),
            label=np.full(num_rows, -1, dtype=np.int32),
            errors={},
            seconds={},
        )
        pixels = self._slots.array(order.slot)
        packer = None
        if self._packed:
            packer = JpegPacker(self._slots.room(order.slot).numpy())
        try:
            if order.row_by_row or not self._samples.fill(order.indices, self._transform, pixels, made.clock):
                self._samples.expect([index for index in (*order.indices, *then) if index not in order.hung])
                at = np.zeros(1, dtype=np.int64) if at is None else at
                num_rows = self._fill_row_by_row(made, order, pixels, packer, at)
        except UsageError as error:
            # What this node alone lacks is no mistake that all ranks could be told of.
            raise StateError(str(error)) from None
        if packer is None:
            pixels[num_rows:] = 0
        else:
            self._slots.trim(order.slot, packer.used)
        if num_rows < len(order.indices):
            rest = replace(order, indices=order.indices[num_rows:])
        return replace(
            made,
            index=made.index[:num_rows],
            label=made.label[:num_rows],
            jpegs=packer.packed() if packer is not None else None,
            read_bytes=_bytes_read() - read_before,
            carried=self._samples.take_carried(order.indices[:num_rows]),
            clipped=self._samples.count_clipped(order.indices[:num_rows]),
            encoded_bytes=packer.used if packer is not None else 0,
            is_last=order.is_last and rest is None,
            rest=rest,
        )

    def _fill_row_by_row(
        self, made: Made, order: Order, pixels: Pixels, packer: JpegPacker | None, at: Integers
    ) -> int:
        """Fill the slot sample by sample; returns how many were enough."""
        samples, limit, started = self._samples, TimeLimit(self._config.timeout_s), time.perf_counter()
        num_rows = len(order.indices)
        with limit.installed():
            for row, index in enumerate(order.indices):
                if packer is not None and packer.used >= self._slots.share:
                    num_rows = row
                    break
                at += 1
                try:
                    if index in order.hung:
                        raise TookTooLongError(order.hung[index])
                    with limit:
                        data = samples.read(index, made.clock) if packer is not None else None
                        header = self._header_for_gpu(data, packer)
                        window = samples.window(index, *header.upright) if header is not None else None
                        if window is not None and not self._may_resize(window):
                            window = None
                        if packer is not None and data is not None and header is not None and window is not None:
                            if not packer.add(data, header, row, window):
                                num_rows = row
                                break
                            made.label[row] = samples.known_label(index)
                        else:
                            image, made.label[row] = samples.load(index, self._transform, made.clock, data)
                            copy_pixels(image, pixels[row])
                except (StateError, UsageError):
                    raise
                except (Exception, TookTooLongError) as error:  # decoders raise all kinds; each bad image is one row
                    pixels[row] = 0
                    made.label[row] = samples.known_label(index)
                    made.errors[index] = row_error(error)
        if packer is not None:
            made.clock("pack", time.perf_counter() - started - sum(made.seconds.values()))
        return num_rows

    def _header_for_gpu(self, data: bytes | None, packer: JpegPacker | None) -> Header | None:
        """The header of a JPEG that a GPU decodes; None for what Pillow decodes or judges: all that is not plain.

        The file alone decides, because the pixels differ: its neighbours in a piece depend on the number of workers.
        """
        if packer is None or data is None:
            return None
        if data is not self._last_data:
            # Another box of the same image has the same.
            self._last_data, self._last_header = data, read_header(data)
        header = self._last_header
        if header is None or not header.plain or len(data) > packer.most:
            return None
        return header if header.width * header.height <= self._config.max_pixels else None

    def _may_resize(self, window: Window) -> bool:
        left, top, right, bottom = window
        return self._transform.may_resize(right - left, bottom - top)


def _bytes_read() -> int:
    """All that this process has read so far, from files (the page cache included) and sockets. Source: proc(5)."""
    asked = int(Path("/proc/self/io").read_bytes().split(b"\n", 1)[0].partition(b":")[2])
    # The kernel does not count there what is read from sockets.
    return asked + object_store.received_bytes()


class TookTooLongError(BaseException):
    """A sample has taken too long. No Exception, or a decoder's own `except Exception` could swallow it."""


def row_error(error: BaseException) -> str:
    """Name the reason why a sample has no prediction, in one line, without the path, which the row has."""
    if isinstance(error, UnidentifiedImageError):
        return "UnidentifiedImageError: empty, or not an image in an allowed format"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    kind = TimeoutError if isinstance(error, TookTooLongError) else type(error)
    return " ".join(f"{kind.__name__}: {text}".split())[:500]


class TimeLimit:
    """Raises `TookTooLongError` in a `with` block of it that takes too long (a stuck network mount, say).

    Only inside `installed`, which many blocks share, because it takes as long as reading a file.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    @contextmanager
    def installed(self) -> Iterator[None]:
        before = signal.signal(signal.SIGALRM, self._raise)
        try:
            yield
        finally:
            signal.signal(signal.SIGALRM, before)

    def _raise(self, _number: int, _frame: FrameType | None) -> None:
        raise TookTooLongError(f"took longer than loader.timeout_s={self._seconds:g}")

    def __enter__(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, self._seconds)

    def __exit__(self, *_raised: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)


def start_worker() -> None:
    leave_stopping_to_parent()
    torch.set_num_threads(1)
