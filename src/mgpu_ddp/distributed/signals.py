"""A signal is a wish to stop: it ends the job only once all ranks have agreed on it."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from mgpu_ddp.errors import Exit

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
INSIST_AFTER_S = 2.0
"""SLURM delivers one signal twice within a millisecond; only a later second one is meant as a second."""


def stop_signals() -> list[signal.Signals]:
    """The signals that ask this process to stop. A hangup that nohup had it ignore is none."""
    is_hangup_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in STOP_SIGNALS if number != signal.SIGHUP or not is_hangup_ignored]


class StopWish:
    """Remembers that this process was asked to stop; a second request after 2 s ends it at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._since = 0.0
        self._asked = threading.Event()
        self._before: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def wait(self, timeout_s: float) -> None:
        """Wait until a signal comes or the time is over."""
        self._asked.wait(timeout_s)

    def install(self) -> None:
        """Take the signals of this process."""
        for number in stop_signals():
            self._before[number] = signal.signal(number, self._receive)

    def uninstall(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_name is None:
            self.signal_name, self._since = signal.Signals(number).name, time.monotonic()
            self._asked.set()
        elif time.monotonic() - self._since > INSIST_AFTER_S:
            # Everything durable is already whole: parts and the manifest are only ever renamed into place.
            os._exit(128 + number)


def die_with_parent(parent: int) -> None:
    """Have the kernel end this process when its parent dies: a `kill -9` of torchrun must not leave workers.

    Source: prctl(2), PR_SET_PDEATHSIG.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:
            # It died before the kernel was asked. A rank would wait for its store for half an hour.
            os._exit(int(Exit.FAILED))


def leave_stopping_to_parent() -> None:
    """Ignore stop signals in a loader worker: its rank decides, and the batch at hand must be finished."""
    rank = multiprocessing.parent_process()
    assert rank is not None
    assert rank.pid is not None
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(rank.pid)
