"""Loader workers as processes: each order goes to whoever has least to do, and what is made comes in the orders' order.

A DataLoader asks its workers in turn, so that one that is slow for a while (its CPU serves the interrupts of all GPUs,
say, which made one ten times slower) sets the pace of its rank.
"""

import itertools
import multiprocessing
import queue
import signal
import traceback
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from selectors import EVENT_READ, DefaultSelector
from typing import Any

from mgpu_ddp.errors import StateError
from mgpu_ddp.workers import BatchMaker, Made, Order, start_worker

LEAVES_S = 5.0
"""A worker that was killed is gone at once, but for one that hangs in a read of a dead mount."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Worker:
    process: BaseProcess
    orders: Any
    """A queue whose `put` never waits."""
    results: Connection
    begun: set[int]
    """Orders that it was given and that did not come back yet."""


class WorkerPool:
    """Processes forked from this one to fill the `slots` of their maker's ring; with 0 workers this one does."""

    def __init__(self, maker: BatchMaker, workers: int, slots: int) -> None:
        # A forked worker starts at once and inherits what is imported; a spawned one would import torch for seconds.
        context = multiprocessing.get_context("fork")
        self._maker, self._slots = maker, slots
        self._workers: list[_Worker] = []
        self._selector = DefaultSelector()
        with warnings.catch_warnings():
            # They are forked beside the pulse thread: they use neither its store client nor CUDA nor gloo.
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork.*", category=DeprecationWarning)
            for _ in range(min(workers, slots)):
                orders: Any = context.Queue()
                results, into = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(maker, orders, into), daemon=True)
                process.start()
                # Else it would not be heard when the worker's end closes.
                into.close()
                worker = _Worker(process=process, orders=orders, results=results, begun=set())
                self._workers.append(worker)
                self._selector.register(results, EVENT_READ, worker)

    def make(self, orders: Iterator[Order], *, ahead: int, held: int) -> Generator[Made]:
        """What becomes of each order, in their order.

        Of those that did not come out yet, `ahead` are given out; slots are used again `held` batches later.

        Raises:
            StateError: a worker died, or the source is not what was listed.
            RuntimeError: a worker raised, with its traceback.
        """
        if not self._workers:
            yield from (self._maker.make(replace(order, slot=n % self._slots)) for n, order in enumerate(orders))
        made: dict[int, Made] = {}
        given: deque[int] = deque()
        free = [*range(self._slots)]
        num_given = 0
        for number in itertools.count():
            if number >= held:
                free.append(given.popleft())
            self._receive(made, timeout_s=0)
            for order in itertools.islice(orders, number + ahead - num_given):
                who = min(range(len(self._workers)), key=lambda each: len(self._workers[each].begun))
                # Rather one that it filled before: it touches fewer pages for the first time.
                slot = min(free, key=lambda each: (each - who) % len(self._workers))
                free.remove(slot)
                given.append(slot)
                self._workers[who].begun.add(num_given)
                self._workers[who].orders.put((num_given, replace(order, slot=slot)))
                num_given += 1
            if num_given == number:
                return
            while number not in made:
                self._receive(made, timeout_s=None)
            yield made.pop(number)

    def _receive(self, made: dict[int, Made], timeout_s: float | None) -> None:
        for key, _ in self._selector.select(timeout_s):
            worker: _Worker = key.data
            try:
                while worker.results.poll():
                    number, result = worker.results.recv()
                    if isinstance(result, Exception):
                        raise result
                    worker.begun.remove(number)
                    made[number] = result
            except (EOFError, ConnectionError):
                raise StateError(
                    f"loader workers must live, got: {_ending_of(worker.process)}. Look for what killed it; lack of"
                    " memory?"
                ) from None

    def close(self) -> None:
        """End the workers now, whatever they are at."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join(LEAVES_S)
            worker.orders.cancel_join_thread()
            worker.orders.close()
            worker.results.close()
        self._selector.close()


def _ending_of(process: BaseProcess) -> str:
    process.join(LEAVES_S)
    code = process.exitcode
    how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exited with {code}"
    return f"worker {process.pid} {how}"


def _work(maker: BatchMaker, orders: Any, results: Connection) -> None:
    """Make what is ordered, for ever."""
    start_worker()
    next_ones: deque[tuple[int, Order]] = deque()
    while True:
        number, order = next_ones.popleft() if next_ones else orders.get()
        with suppress(queue.Empty):
            next_ones.append(orders.get_nowait())
        then: Sequence[int] = next_ones[0][1].indices if next_ones else ()
        result: Made | Exception
        try:
            result = maker.make(order, then)
        except StateError as error:
            result = error
        except Exception as error:  # the rank tells it, with the worker's traceback
            result = RuntimeError("".join(traceback.format_exception(error)))
        results.send((number, result))
