"""The predicting thread and the collecting one never deadlock, however a task ends."""

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mgpu_ddp.distributed.channel import Channel
from mgpu_ddp.distributed.sharding import Plan
from mgpu_ddp.distributed.signals import StopWish
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import PeerLostError, SampleError, WriteError
from mgpu_ddp.inference.clock import Clock
from mgpu_ddp.job.agreement import Limits
from mgpu_ddp.job.collector import Collector, Committer, Sink
from mgpu_ddp.output.manifest import PARTS, Manifest
from mgpu_ddp.output.parts import Table, open_writer
from tests.support.samples import make_rows, texts

WINDOW, BATCH, STOP = 8, 4, 24


class Gate(Channel):
    """A channel that gathers once it is opened, and from a window on has lost a rank."""

    def __init__(self, world: World, job: str, lost_at: int) -> None:
        super().__init__(world, job, timeout_s=30)
        self.opened, self.lost_at = threading.Event(), lost_at

    def gather(self, window: int, payload: Any) -> list[Any]:
        assert self.opened.wait(30)
        if window >= self.lost_at:
            raise PeerLostError("rank 1 of 2 died")
        return super().gather(window, payload)


class Run:
    """One rank's task of three windows, without a model."""

    def __init__(self, folder: Path, world: World, *, contiguous: bool, lost_at: int = 99, max_errors: float = 99):
        (folder / PARTS).mkdir()
        self.manifest = Manifest(fingerprint={"output.format": "parquet"}, start=0, stop=STOP, batch_size=BATCH)
        self.manifest.write(folder)
        self.stop = StopWish()
        self.channel = Gate(world, str(folder), lost_at)
        self.channel.opened.set()
        job: Any = SimpleNamespace(name=str(folder))
        context: Any = SimpleNamespace(job=job, world=world, stop=self.stop, clock=Clock(warm_up=1, began=0.0))
        sizes = {"smallest_rows": WINDOW, "largest_rows": WINDOW, "batch_size": BATCH}
        plan = Plan(start=0, stop=STOP, size=1, contiguous=contiguous, **sizes)
        writer = open_writer(folder, "parquet", lambda index: texts(map(str, index)), None, "t", 0)
        sink = Sink(writer=writer, table=Table(folder, self.manifest, writer))
        limits = Limits(stop=STOP, errors_before=0, max_errors=max_errors)
        self.collector = Collector(context, plan, Committer(context, plan, self.channel, sink, limits))

    def predict(self, before: Callable[[int], None] = lambda first: None, *, heeds: bool = True) -> None:
        """Predict all rows, batch by batch, as a task does."""
        with self.collector:
            for first in range(0, STOP, BATCH):
                before(first)
                self.collector.add(make_rows(first, BATCH, errors={first: "broken"}))
                if heeds and self.collector.over:
                    return


Start = Callable[..., Run]


@pytest.fixture(params=[False, True], ids=["gather", "shards"])
def start(request: pytest.FixtureRequest, tmp_path: Path, world: World) -> Start:
    return lambda **changes: Run(tmp_path, world, contiguous=request.param, **changes)


def test_every_window_is_committed(start: Start) -> None:
    run = start()
    run.predict()
    assert run.collector.ending == "complete"
    assert [(part.first, part.stop) for part in run.manifest.parts] == [(0, 8), (8, 16), (16, 24)]


def test_a_stop_commits_what_is_done(start: Start) -> None:
    run = start()

    def stop_at_12(first: int) -> None:
        if first == 12:
            run.stop.signal_name = "SIGTERM"

    run.predict(stop_at_12)
    assert run.collector.ending == "preempted"
    assert run.manifest.prefix == 16


def test_too_many_errors_end_the_task_after_their_window(start: Start) -> None:
    run = start(max_errors=1)
    run.predict(heeds=False)
    assert run.collector.ending == "too many errors"
    assert run.manifest.prefix == WINDOW


def test_what_the_loop_raises_is_raised_and_what_it_did_before_is_committed(start: Start) -> None:
    run = start()

    def fail_at_12(first: int) -> None:
        if first == 12:
            raise SampleError("row 12")

    with pytest.raises(SampleError, match="row 12"):
        run.predict(fail_at_12)
    assert run.manifest.prefix == 12


def test_what_the_loop_raises_after_its_last_window_ends_nothing(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    run = start()
    with run.collector:
        for first in range(0, STOP, BATCH):
            run.collector.add(make_rows(first, BATCH))
        raise ValueError("a worker died")
    assert run.collector.ending == "complete"
    assert run.manifest.prefix == STOP
    assert "after the last window: ValueError: a worker died" in caplog.text


@pytest.mark.parametrize("heeds", [True, False])
def test_a_failed_write_ends_the_loop(start: Start, tmp_path: Path, heeds: bool) -> None:
    run = start()
    (tmp_path / PARTS).rmdir()
    with pytest.raises(WriteError, match="No such file or directory"):
        run.predict(heeds=heeds)
    assert run.manifest.parts == []


@pytest.mark.parametrize("lost_at", [0, 1, 2, 3])
def test_a_lost_rank_ends_the_loop(start: Start, lost_at: int) -> None:
    run = start(lost_at=lost_at)
    # By then the loop waits to hand over its second window.
    run.channel.opened.clear()
    threading.Timer(0.3, run.channel.opened.set).start()
    with pytest.raises(PeerLostError, match="rank 1 of 2 died"):
        run.predict(heeds=False)
    # The fourth is the acknowledgement of the third.
    assert run.manifest.prefix == WINDOW * lost_at


def test_a_third_window_is_not_begun_before_the_first_is_gathered(start: Start) -> None:
    run = start()
    run.channel.opened.clear()
    begun: list[int] = []
    thread = threading.Thread(target=run.predict, args=(begun.append,), daemon=True)
    thread.start()
    thread.join(0.3)
    assert begun == [0, 4, 8, 12]
    run.channel.opened.set()
    thread.join(30)
    assert begun == [*range(0, STOP, BATCH)]
    assert run.manifest.prefix == STOP
