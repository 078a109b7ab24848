"""Windows of the dataset, and each rank's rows in every window.

A window is a contiguous index range that all ranks finish together; it is what becomes durable at once.
Everything here follows from numbers that every rank knows, so no rank has to be told.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast, overload

from torch.utils.data import Dataset, DistributedSampler

TARGET_S = 10.0
"""How long a window of `commit_every=auto` should take: the most work that a crash can cost."""
LOOKAHEAD = 3
"""Window k may be sized by what windows up to k-3 took; see `Plan`."""
GROWTH = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """A contiguous range [start, stop) of dataset indices."""

    number: int
    start: int
    stop: int


class BlockCyclic(Sequence[int]):
    """One rank's indices of [start, stop), ascending, where block b goes to rank b mod W."""

    def __init__(self, start: int, stop: int, block: int, rank: int, size: int) -> None:
        self._start, self._stop, self._block, self._rank, self._size = start, stop, block, rank, size
        rounds, rest = divmod(stop - start, block * size)
        self._length = rounds * block + min(max(rest - rank * block, 0), block)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        # Several times as fast as place by place.
        for first in range(self._start + self._rank * self._block, self._stop, self._size * self._block):
            yield from range(first, min(first + self._block, self._stop))

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[int]: ...
    def __getitem__(self, place: int | slice) -> int | Sequence[int]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(self._length))]
        number, within = divmod(range(self._length)[place], self._block)
        return self._start + (number * self._size + self._rank) * self._block + within


class Plan:
    """The windows of a job, the same on every rank.

    Where `smallest_rows` and `largest_rows` are equal, all windows are known from the start. Otherwise the first three
    have `smallest_rows`, and window k is sized by how long window k-3 took on its slowest rank, a number that every
    rank has gathered. Nobody ever waits for it: a rank predicts window m only after window m-2 is gathered, and its
    loader reads ahead at most `smallest_rows`, that is into window m+1.
    """

    def __init__(
        self,
        *,
        start: int,
        stop: int,
        size: int,
        batch_size: int,
        contiguous: bool,
        smallest_rows: int,
        largest_rows: int,
        block: int = 1,
    ) -> None:
        self.start, self.stop, self.size, self.batch_size = start, stop, size, batch_size
        self.contiguous, self.block = contiguous, block
        self.step = size * (batch_size if contiguous else math.lcm(batch_size, block))
        self.smallest = self._whole_steps(smallest_rows)
        self.largest = max(self._whole_steps(largest_rows), self.smallest)
        self._stops = [start]
        self._rates: list[float] = []
        self._lock = threading.Lock()

    def _whole_steps(self, rows: int) -> int:
        """Round up to whole batches, and blocks, of all ranks, so that only the last window has a ragged tail."""
        return max(1, -(-rows // self.step)) * self.step

    def window(self, number: int) -> Window | None:
        """Window `number`, or None past the end.

        Raises:
            IndexError: asked before the window that sizes it was gathered.
        """
        with self._lock:
            while len(self._stops) <= number + 1 and self._stops[-1] < self.stop:
                self._stops.append(min(self._stops[-1] + self._rows_of(len(self._stops) - 1), self.stop))
            if number + 1 >= len(self._stops):
                return None
            return Window(number=number, start=self._stops[number], stop=self._stops[number + 1])

    def _rows_of(self, number: int) -> int:
        if self.smallest == self.largest or number < LOOKAHEAD:
            return self.smallest
        before = self._stops[number] - self._stops[number - 1]
        wanted = self._rates[number - LOOKAHEAD] * TARGET_S
        return self._whole_steps(int(max(self.smallest, min(wanted, self.largest, before * GROWTH))))

    def gathered(self, window: Window, slowest_s: float) -> None:
        """Learn how long a window took on its slowest rank, a number that every rank has gathered."""
        with self._lock:
            self._rates.append((window.stop - window.start) / max(slowest_s, 1e-3))

    def rows(self, window: Window, rank: int) -> Sequence[int]:
        """Return the indices of one rank in one window, ascending.

        Block by block in turn where rows travel to rank 0 (with blocks of one that is DistributedSampler's own rule,
        without its padding); one contiguous stretch where each rank writes its own part.
        """
        if not self.contiguous:
            if 1 in (self.block, self.size):
                return range(window.start + rank, window.stop, self.size)
            return BlockCyclic(window.start, window.stop, self.block, rank, self.size)
        each, extra = divmod(window.stop - window.start, self.size)
        first = window.start + rank * each + min(rank, extra)
        return range(first, first + each + (rank < extra))

    @property
    def rows_left(self) -> int:
        return self.stop - self.start

    def windows(self) -> Iterator[Window]:
        number = 0
        while (window := self.window(number)) is not None:
            yield window
            number += 1

    def count(self, rank: int) -> int:
        """Count the rows that one rank owes in all."""
        # Windows before the last split evenly, so the remainder is the last one's alone.
        return len(self.rows(Window(number=0, start=self.start, stop=self.stop), rank))


class ShardSampler(DistributedSampler[int]):
    """A DistributedSampler that walks ranges: no padding, no list of N integers, any start.

    Yields this rank's indices window by window. Batches never straddle windows, because every window but the
    last holds whole batches of all ranks.
    """

    def __init__(self, plan: Plan, rank: int) -> None:
        everything = cast("Dataset[Any]", range(plan.start, plan.stop))
        super().__init__(everything, num_replicas=plan.size, rank=rank, shuffle=False)
        self.plan = plan
        self.num_samples = plan.count(rank)
        self.total_size = plan.stop - plan.start

    def __iter__(self) -> Iterator[int]:
        for window in self.plan.windows():
            yield from self.plan.rows(window, self.rank)

    def batches(self, size: int) -> Iterator[list[int]]:
        """This rank's indices, so many at a time, but for the last ones of each window."""
        for window in self.plan.windows():
            rows = self.plan.rows(window, self.rank)
            yield from ([*rows[first : first + size]] for first in range(0, len(rows), size))

    def __len__(self) -> int:
        return self.num_samples
