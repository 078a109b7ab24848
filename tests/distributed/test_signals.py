"""A signal is a wish to stop, and SLURM delivers each one twice."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgpu_ddp.distributed.signals import STOP_SIGNALS, StopWish, die_with_parent
from tests.support.forks import fork


@pytest.fixture
def own_handlers() -> Iterator[None]:
    """Handlers of signals that are put back after the test."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("own_handlers")
def test_a_signal_that_comes_twice_at_once_is_one_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two signals sent from outside may reach the process as one: these come one after the other.
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    stop = StopWish()
    stop.install()
    assert not stop
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert stop.signal_name == "SIGTERM"
    assert exits == []


@pytest.mark.usefixtures("own_handlers")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"])
def test_each_signal_that_ends_a_process_is_a_wish(name: str) -> None:
    stop = StopWish()
    stop.install()
    signal.raise_signal(signal.Signals[name])
    assert stop.signal_name == name


@pytest.mark.usefixtures("own_handlers")
def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopWish()
    stop.install()
    signal.raise_signal(signal.SIGHUP)
    assert not stop
    signal.raise_signal(signal.SIGTERM)
    assert stop.signal_name == "SIGTERM"


def outlive_parent() -> None:
    """Be a process whose parent is another one than it was."""
    die_with_parent(os.getpid())
    sys.exit(7)


def test_a_process_whose_parent_has_died_before_ends_as_well(tmp_path: Path) -> None:
    assert fork(outlive_parent, cwd=tmp_path).wait(60) == 1
    assert (tmp_path / "stderr.txt").read_text() == ""
