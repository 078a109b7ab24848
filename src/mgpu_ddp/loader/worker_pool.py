"""Loader workers as processes: whichever is free takes the next order, and batches come out in the orders' order.

A DataLoader gives its workers orders in turn, so that one slow worker sets the pace of its rank. A worker on a CPU that
serves a GPU's interrupts is slow: 30,000 a second while JPEGs are decoded made it ten times slower (H200, driver 580).
"""

import itertools
import multiprocessing
import queue
import signal
import traceback
import warnings
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from selectors import EVENT_READ, DefaultSelector
from typing import Any

from mgpu_ddp.errors import StateError
from mgpu_ddp.loader.worker import BatchMaker, Made, Order, start_worker

LEAVES_S = 5.0
"""A killed worker is gone at once, unless it hangs in a read from a dead mount."""


class WorkerPool:
    """Processes forked from this one that fill slots 0 to `num_slots` - 1; with 0 workers this process does."""

    def __init__(self, maker: BatchMaker, workers: int, num_slots: int) -> None:
        # A forked worker starts at once and inherits what is imported; a spawned one would import torch for seconds.
        context = multiprocessing.get_context("fork")
        self._maker, self._num_slots = maker, num_slots
        self._workers: dict[Connection, BaseProcess] = {}
        self._selector = DefaultSelector()
        # Its `put` never waits.
        self._orders: Any = context.Queue()
        with warnings.catch_warnings():
            # They are forked beside the heartbeat thread: they use neither its store client nor CUDA nor gloo.
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork.*", category=DeprecationWarning)
            for _ in range(min(workers, num_slots)):
                results, into = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(maker, self._orders, into), daemon=True)
                process.start()
                # Otherwise nobody would notice when the worker's end closes.
                into.close()
                self._workers[results] = process
                self._selector.register(results, EVENT_READ)

    def make(self, orders: Iterator[Order], *, ahead: int, held: int) -> Generator[Made]:
        """Yield what is made of each order, in their order.

        Up to `ahead` orders are given out before their turn; a slot is used again `held` batches later.

        Raises:
            StateError: a worker died, or the source is not what was listed.
            RuntimeError: a worker raised, with its traceback.
        """
        if not self._workers:
            yield from (self._maker.make(replace(order, slot=n % self._num_slots)) for n, order in enumerate(orders))
        made: dict[int, Made] = {}
        in_use: deque[int] = deque()
        # The first slots are pinned first, and the slot used last is used next: it may be in a cache.
        free = [*reversed(range(self._num_slots))]
        num_given = 0
        for number in itertools.count():
            if number >= held:
                free.append(in_use.popleft())
            self._receive(made, timeout_s=0)
            for order in itertools.islice(orders, number + ahead - num_given):
                in_use.append(free.pop())
                self._orders.put((num_given, replace(order, slot=in_use[-1])))
                num_given += 1
            if num_given == number:
                return
            while number not in made:
                self._receive(made, timeout_s=None)
            yield made.pop(number)

    def _receive(self, made: dict[int, Made], timeout_s: float | None) -> None:
        """Take what workers have made, by the number of the order; waits for the first one up to `timeout_s`."""
        for key, _ in self._selector.select(timeout_s):
            results: Any = key.fileobj
            try:
                while results.poll():
                    number, result = results.recv()
                    if isinstance(result, Exception):
                        raise result
                    made[number] = result
            except (EOFError, ConnectionError):
                raise StateError(_ending_of(self._workers[results])) from None

    def close(self) -> None:
        """Kill the workers, whatever they are doing."""
        for process in self._workers.values():
            process.kill()
        for results, process in self._workers.items():
            process.join(LEAVES_S)
            results.close()
        self._orders.cancel_join_thread()
        self._orders.close()
        self._selector.close()


def _ending_of(process: BaseProcess) -> str:
    process.join(LEAVES_S)
    code = process.exitcode
    if code is not None and code < 0:
        return f"loader worker {process.pid} was killed ({signal.Signals(-code).name}); out of memory?"
    return f"loader worker {process.pid} left with exit code {code}; its own output may say why."


def _work(maker: BatchMaker, orders: Any, results: Connection) -> None:
    """Make what is ordered until this process is killed."""
    start_worker()
    next_one: tuple[int, Order] | None = None
    while True:
        number, order = next_one or orders.get()
        next_one = None
        if maker.looks_ahead:
            with suppress(queue.Empty):
                next_one = orders.get_nowait()
        result: Made | Exception
        try:
            result = maker.make(order, next_one[1].indices if next_one else ())
        except StateError as error:
            result = error
        except Exception as error:  # the rank raises it, with the worker's traceback
            result = RuntimeError("".join(traceback.format_exception(error)))
        results.send((number, result))
