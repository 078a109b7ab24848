"""Which rows are whose: every index exactly once, in contiguous windows of whole batches."""

import itertools
from typing import Any

import pytest
from torch.utils.data import BatchSampler, Dataset, DistributedSampler

from mgpu_ddp.distributed.sharding import GROWTH, LOOKAHEAD, TARGET_S, Plan, ShardSampler, Window

COUNTS = (0, 1, 2, 3, 4, 5, 31, 97, 1000)
SIZES = (1, 2, 3, 4, 7)
WINDOWS = (1, 8, 50, 10_000)


def make_plan(**changes: Any) -> Plan:
    values = {"start": 0, "stop": 97, "size": 3, "batch_size": 4, "contiguous": False, "smallest_rows": 24}
    values |= {"largest_rows": changes.get("smallest_rows", 24), **changes}
    return Plan(**values)


def owed(block: int, plan: Plan, rank: int) -> list[int]:
    """The rule spelt out: within its window, block b goes to rank b mod W."""
    return [
        index
        for window in plan.windows()
        for index in range(window.start, window.stop)
        if (index - window.start) // block % plan.size == rank
    ]


def batches_of(plan: Plan, rank: int) -> list[list[int]]:
    return list(BatchSampler(ShardSampler(plan, rank), plan.batch_size, drop_last=False))


@pytest.mark.parametrize("contiguous", [False, True], ids=["cyclic", "contiguous"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", COUNTS)
def test_every_index_is_owed_once(count: int, size: int, contiguous: bool) -> None:
    for window_rows, start, batch_size in itertools.product(WINDOWS, (0, 13), (1, 4)):
        plan = make_plan(
            start=start,
            stop=start + count,
            size=size,
            batch_size=batch_size,
            contiguous=contiguous,
            smallest_rows=window_rows,
        )
        windows = list(plan.windows())
        assert [w.number for w in windows] == list(range(len(windows)))
        assert [w.start for w in windows] == [start, *(w.stop for w in windows[:-1])][: len(windows)]
        assert (windows[-1].stop if windows else start) == start + count
        assert plan.window(len(windows)) is None

        rows = [list(ShardSampler(plan, rank)) for rank in range(size)]
        assert sorted(itertools.chain(*rows)) == list(range(start, start + count))
        assert [len(ShardSampler(plan, rank)) for rank in range(size)] == [len(r) for r in rows]
        assert max(map(len, rows)) - min(map(len, rows)) <= 1

        for rank in range(size):
            assert rows[rank] == sorted(rows[rank])
            for batch in batches_of(plan, rank):
                inside = [w for w in windows if w.start <= batch[0] < w.stop]
                assert len(inside) == 1
                assert inside[0].start <= batch[-1] < inside[0].stop, "a batch straddles two windows"


@pytest.mark.parametrize("contiguous", [False, True], ids=["cyclic", "contiguous"])
def test_only_the_last_window_has_a_ragged_tail(contiguous: bool) -> None:
    plan = make_plan(contiguous=contiguous, smallest_rows=20)
    windows = list(plan.windows())
    assert [w.stop - w.start for w in windows] == [24, 24, 24, 24, 1]
    for window in windows[:-1]:
        assert {len(plan.rows(window, rank)) for rank in range(3)} == {8}


@pytest.mark.parametrize("block", [1, 2, 4, 5, 12, 1000])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", COUNTS)
def test_blocks_of_every_size_are_dealt_in_turn(count: int, size: int, block: int) -> None:
    for window_rows, start in itertools.product(WINDOWS, (0, 13)):
        plan = make_plan(start=start, stop=start + count, size=size, smallest_rows=window_rows, block=block)
        windows = list(plan.windows())
        rows = [list(ShardSampler(plan, rank)) for rank in range(size)]
        assert sorted(itertools.chain(*rows)) == list(range(start, start + count))
        assert rows == [owed(block, plan, rank) for rank in range(size)]
        assert [plan.count(rank) for rank in range(size)] == [len(r) for r in rows]
        for window in windows[:-1]:
            assert {len(plan.rows(window, rank)) % plan.batch_size for rank in range(size)} == {0}
            # Across windows too the blocks are those of one count from the start.
            assert (window.stop - start) % (size * block) == 0
        if windows:
            last = plan.rows(windows[-1], 0)
            assert list(last[:3]) == list(last)[:3]
            assert [last[i] for i in range(len(last))] == list(last)
            with pytest.raises(IndexError):
                last[len(last)]


def test_stretches_know_no_blocks() -> None:
    plan = make_plan(contiguous=True, block=1000)
    assert plan.step == 12


def test_contiguous_stretches_lie_in_dataset_order() -> None:
    plan = make_plan(stop=25, smallest_rows=1000, contiguous=True)
    window = plan.window(0)
    assert window is not None
    stretches = [plan.rows(window, rank) for rank in range(3)]
    assert stretches == [range(9), range(9, 17), range(17, 25)]


@pytest.mark.parametrize("size", SIZES)
def test_equals_distributed_sampler_where_the_samples_divide(size: int) -> None:
    samples: Dataset[Any] = range(12 * size)  # type: ignore[assignment]
    plan = make_plan(stop=12 * size, size=size, smallest_rows=5 * size)
    for rank in range(size):
        sampler = ShardSampler(plan, rank)
        theirs = DistributedSampler(samples, num_replicas=size, rank=rank, shuffle=False)
        assert isinstance(sampler, DistributedSampler)
        assert list(sampler) == list(theirs)
        assert len(sampler) == len(theirs)


def grow(plan: Plan, seconds: list[float]) -> list[Window]:
    """Walk the windows, gathering each at the pace that the list gives, over and over."""
    pace = itertools.cycle(seconds)
    windows = []
    for number in itertools.count():
        window = plan.window(number)
        if window is None:
            return windows
        windows.append(window)
        plan.gathered(window, next(pace))
    raise AssertionError


@pytest.mark.parametrize("contiguous", [False, True], ids=["cyclic", "contiguous"])
@pytest.mark.parametrize("seconds", [[0.0], [0.5], [1e9], [0.1, 30, 2]])
def test_growing_windows_cover_all_in_whole_batches(contiguous: bool, seconds: list[float]) -> None:
    plan = make_plan(stop=50_001, largest_rows=5000, contiguous=contiguous)
    windows = grow(plan, seconds)
    sizes = [w.stop - w.start for w in windows]
    assert sum(sizes) == 50_001
    assert sizes[:LOOKAHEAD] == [24] * LOOKAHEAD
    assert all(rows % plan.step == 0 for rows in sizes[:-1])
    assert all(24 <= rows <= plan.largest for rows in sizes[:-1])
    assert all(after <= max(before * GROWTH, 24) for before, after in itertools.pairwise(sizes))
    rows = [index for window in windows for rank in range(3) for index in plan.rows(window, rank)]
    assert sorted(rows) == list(range(50_001))
    assert [sum(len(plan.rows(w, rank)) for w in windows) for rank in range(3)] == [plan.count(r) for r in range(3)]


def test_windows_aim_at_the_target_time() -> None:
    plan = make_plan(stop=10**6, largest_rows=10**6)
    rows = 0
    for number in range(12):
        window = plan.window(number)
        assert window is not None
        rows = window.stop - window.start
        plan.gathered(window, rows / 120)  # a steady 120 rows a second
    assert rows == 120 * TARGET_S


def test_asking_before_the_sizing_window_was_gathered_raises() -> None:
    plan = make_plan(stop=10**6, largest_rows=5000)
    for number in range(LOOKAHEAD):
        assert plan.window(number) is not None
    with pytest.raises(IndexError):
        plan.window(LOOKAHEAD)
    for number in range(20):
        window = plan.window(number)
        assert window is not None
        plan.gathered(window, 1.0)
        assert plan.window(number + LOOKAHEAD) is not None, "known as soon as window k-3 is gathered"
        with pytest.raises(IndexError):
            plan.window(number + LOOKAHEAD + 1)


def test_fixed_windows_wait_for_nothing() -> None:
    plan = make_plan(stop=10_000)
    assert plan.window(300) is not None
    assert len(list(plan.windows())) == -(-10_000 // 24)


def test_every_rank_finds_the_same_windows_whoever_asks_first() -> None:
    early, late = make_plan(stop=5000, largest_rows=1000), make_plan(stop=5000, largest_rows=1000)
    windows = grow(early, [0.2, 3])
    for number, seconds in zip(range(len(windows)), itertools.cycle([0.2, 3]), strict=False):
        late.gathered(windows[number], seconds)
    assert list(late.windows()) == windows


def test_a_huge_dataset_costs_no_list_of_its_indices() -> None:
    plan = make_plan(stop=10**15, smallest_rows=10**13, size=4)
    sampler = ShardSampler(plan, 3)
    assert len(sampler) == 10**15 // 4
    assert list(itertools.islice(sampler, 3)) == [3, 7, 11]


@pytest.mark.parametrize("rank", range(2))
def test_batches_that_are_loaded_together_end_with_their_window(rank: int) -> None:
    plan = Plan(start=3, stop=100, size=2, batch_size=4, contiguous=False, smallest_rows=24, largest_rows=24)
    found = [*ShardSampler(plan, rank).batches(8)]
    assert [len(indices) for indices in found] == [8, 4, 8, 4, 8, 4, 8, 4, 1][: 9 - rank]
    assert [index for indices in found for index in indices] == [*ShardSampler(plan, rank)]
