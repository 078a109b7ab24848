"""Loader workers as processes: whichever is free takes the next order, and batches come out in the orders' order.

A DataLoader gives its workers orders in turn, so that one slow worker sets the pace of its rank. A worker on a CPU that
serves a GPU's interrupts is slow: 30,000 a second while JPEGs are decoded made it ten times slower (H200, driver 580).

A worker ends a sample that takes too long by itself, unless it is stopped or a decoder never returns to Python. The
pool therefore watches the order it waits for, and replaces workers that hang.
"""

import itertools
import logging
import multiprocessing
import os
import pickle
import queue
import signal
import struct
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing.process import BaseProcess
from selectors import EVENT_READ, DefaultSelector
from typing import Any

import numpy as np

from mgpu_ddp.data import shared_memory
from mgpu_ddp.errors import StateError
from mgpu_ddp.loader.worker import BatchMaker, Made, Order, start_worker
from mgpu_ddp.preprocess.transform import Integers

log = logging.getLogger("mgpu_ddp")

LEAVES_S = 5.0
"""A killed worker is gone at once, unless it hangs in a read from a dead mount."""
MARGIN_S = 10.0
"""Time beyond `loader.timeout_s` that a worker has to end a sample by itself."""
POLL_S = 0.5
HANGS = 2
"""A sample at which so many workers have hung is an error row."""
LENGTH = struct.Struct("Q")
PIPE_BYTES = 1 << 16
"""A pipe holds no more. Source: pipe(7)."""
ROW_BITS = 32


class WorkerPool:
    """Processes forked from this one that fill slots 0 to `num_slots` - 1; with 0 workers this process does."""

    def __init__(self, maker: BatchMaker, workers: int, num_slots: int) -> None:
        self._maker, self._num_slots = maker, num_slots
        self._workers = Workers(maker, min(workers, num_slots))
        self._given: dict[int, Order] = {}
        """Orders that are not made yet, by number."""
        self._hung: Counter[tuple[str, int]] = Counter()
        """How often workers have hung, by sample, or by order where no sample was begun."""

    def make(self, orders: Iterator[Order], *, ahead: int, held: int) -> Generator[Made]:
        """Yield what is made of the orders, in their order; the rest of one that is not made whole is ordered again.

        Up to `ahead` orders are given out before their turn; a slot is used again `held` results later.

        Raises:
            StateError: a worker died, or the source is not what was listed.
            RuntimeError: a worker raised, with its traceback.
        """
        made: dict[int, Made] = {}
        given: deque[int] = deque()
        """In the order of their samples."""
        held_slots: deque[int] = deque()
        # The first slots are pinned first, and the slot used last is used next: it may be in a cache.
        free = [*reversed(range(self._num_slots))]
        numbers = itertools.count()

        def give(order: Order) -> int:
            number = next(numbers)
            self._give(number, replace(order, slot=free.pop()))
            return number

        while True:
            if len(held_slots) == held:
                free.append(held_slots.popleft())
            self._receive(made, timeout_s=0)
            given.extend(give(order) for order in itertools.islice(orders, ahead - len(given)))
            if not given:
                return
            number = given.popleft()
            self._wait_for(number, made)
            result = made.pop(number)
            held_slots.append(result.slot)
            if result.rest is not None:
                given.appendleft(give(result.rest))
            yield result

    def _give(self, number: int, order: Order) -> None:
        self._given[number] = order
        if self._workers.processes:
            self._workers.orders.put((number, order))

    def _receive(self, made: dict[int, Made], timeout_s: float) -> None:
        for number, result in self._workers.receive(timeout_s):
            if isinstance(result, Exception):
                raise result
            made[number] = result
            del self._given[number]

    def _wait_for(self, number: int, made: dict[int, Made]) -> None:
        """Wait until an order is made, and replace the workers when nobody gets on with it."""
        if not self._workers.processes:
            made[number] = self._maker.make(self._given.pop(number))
        limit_s, silent_s, seen = self._maker.timeout_s + MARGIN_S, 0.0, [-1]
        while number not in made:
            since = time.monotonic()
            self._receive(made, POLL_S)
            # This process may itself have been stopped for a while, so only time that it was awake counts.
            silent_s += min(time.monotonic() - since, POLL_S)
            at = self._workers.at(number)
            if at != seen:
                silent_s, seen = 0.0, at
            elif silent_s > limit_s and number not in made:
                self._start_again(number, limit_s)
                silent_s = 0.0

    def _start_again(self, number: int, limit_s: float) -> None:
        """Give everything that is not made yet to new workers.

        All are replaced: one that is stopped or killed may hold the lock of the queue of orders.

        Raises:
            StateError: the new workers hang as well, before they begin a sample.
        """
        order, row = self._given[number], self._workers.row_of(number)
        where = ("batch", number) if row is None else ("sample", order.indices[row])
        self._hung[where] += 1
        reason = f"a loader worker hung for {limit_s:g} s"
        log.warning("%s at %s %d: workers are started again", reason, *where)
        if self._hung[where] >= HANGS and row is None:
            raise StateError(
                f"{reason} {HANGS} times before the first sample of a batch. Start again, with fewer loader.workers or"
                " a higher loader.timeout_s."
            )
        if self._hung[where] >= HANGS:
            order = replace(order, hung={**order.hung, where[1]: f"{reason}, {HANGS} times"})
        self._given[number] = replace(order, row_by_row=True)
        hanging = self._workers
        self._workers = Workers(self._maker, len(hanging.processes))
        # Before there are orders for the new ones, whose slots are the same.
        hanging.close()
        for each in list(self._given.items()):
            self._give(*each)

    def close(self) -> None:
        """Kill the workers, whatever they are doing."""
        self._workers.close()


class Workers:
    """Worker processes, the queue from which they take orders, and a pipe of results from each."""

    def __init__(self, maker: BatchMaker, number: int) -> None:
        # A forked worker starts at once and inherits what is imported; a spawned one would import torch for seconds.
        context = multiprocessing.get_context("fork")
        self.processes: list[BaseProcess] = []
        self._results: list[Results] = []
        self._selector = DefaultSelector()
        # Its `put` never waits.
        self.orders: Any = context.Queue()
        self._at: Integers = np.frombuffer(shared_memory.allocate(8 * max(number, 1)), dtype=np.int64)
        """For each worker, the number of its order and, from 1, the row it is at (0 before), in one word."""
        self._at[:] = -1
        with warnings.catch_warnings():
            # They are forked beside the heartbeat thread: they use neither its store client nor CUDA nor gloo.
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork.*", category=DeprecationWarning)
            for worker in range(number):
                results, into = os.pipe()
                at = self._at[worker : worker + 1]
                process = context.Process(target=_work, args=(maker, self.orders, into, at), daemon=True)
                process.start()
                # Otherwise nobody would notice when the worker's end closes.
                os.close(into)
                self.processes.append(process)
                self._results.append(Results(results))
                self._selector.register(results, EVENT_READ, worker)

    def receive(self, timeout_s: float) -> Iterator[tuple[int, Made | Exception]]:
        """The results of workers, by the number of the order; waits for the first one up to `timeout_s`.

        Raises:
            StateError: a worker died.
        """
        for key, _ in self._selector.select(timeout_s):
            try:
                yield from self._results[key.data].read()
            except EOFError:
                raise StateError(_ending_of(self.processes[key.data])) from None

    def at(self, number: int) -> list[int]:
        """A value that changes as long as somebody gets on with an order; before it is taken, with any order."""
        words: list[int] = self._at.tolist()
        return [word for word in words if word >> ROW_BITS == number] or words

    def row_of(self, number: int) -> int | None:
        """The row of an order at which a worker is; None where it has begun none."""
        rows = [word & ((1 << ROW_BITS) - 1) for word in self._at.tolist() if word >> ROW_BITS == number]
        return rows[0] - 1 if rows and rows[0] else None

    def close(self) -> None:
        """Kill the workers, whatever they are doing."""
        for process in self.processes:
            process.kill()
        for process, results in zip(self.processes, self._results, strict=True):
            process.join(LEAVES_S)
            results.close()
        self.orders.cancel_join_thread()
        self.orders.close()
        self._selector.close()


class Results:
    """The reading end of a worker's pipe. It never waits for the rest of a result: its worker may have been stopped."""

    def __init__(self, file: int) -> None:
        os.set_blocking(file, False)
        self._file, self._data = file, bytearray()

    def read(self) -> Iterator[tuple[int, Made | Exception]]:
        """Read what there is, and yield the results that are whole.

        Raises:
            EOFError: the worker has ended.
        """
        chunk = None
        with suppress(BlockingIOError):
            while chunk != b"":
                chunk = os.read(self._file, PIPE_BYTES)
                self._data += chunk
        while len(self._data) >= LENGTH.size:
            stop = LENGTH.size + LENGTH.unpack_from(self._data)[0]
            if len(self._data) < stop:
                break
            result = pickle.loads(memoryview(self._data)[LENGTH.size : stop])
            del self._data[:stop]
            yield result
        if chunk == b"":
            raise EOFError

    def close(self) -> None:
        os.close(self._file)


def _ending_of(process: BaseProcess) -> str:
    process.join(LEAVES_S)
    code = process.exitcode
    if code is not None and code < 0:
        return f"loader worker {process.pid} was killed ({signal.Signals(-code).name}); out of memory?"
    return f"loader worker {process.pid} left with exit code {code}; its own output may say why."


def _work(maker: BatchMaker, orders: Any, into: int, at: Integers) -> None:
    """Make what is ordered until this process is killed."""
    start_worker()
    next_one: tuple[int, Order] | None = None
    with open(into, "wb") as results:
        while True:
            number, order = next_one or orders.get()
            next_one = None
            if maker.looks_ahead:
                with suppress(queue.Empty):
                    next_one = orders.get_nowait()
            at[0] = number << ROW_BITS
            result: Made | Exception
            try:
                result = maker.make(order, next_one[1].indices if next_one else (), at)
            except StateError as error:
                result = error
            except Exception as error:  # the rank raises it, with the worker's traceback
                result = RuntimeError("".join(traceback.format_exception(error)))
            data = pickle.dumps((number, result))
            results.write(LENGTH.pack(len(data)))
            results.write(data)
            results.flush()
