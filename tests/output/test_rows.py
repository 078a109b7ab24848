"""Rows on their way from a rank to the table."""

import numpy as np

from mgpu_ddp.output.rows import Rows, concatenate, in_order
from tests.support.samples import make_rows


def same(a: Rows, b: Rows) -> bool:
    return (
        np.array_equal(a.index, b.index)
        and np.array_equal(a.label, b.label)
        and a.columns.keys() == b.columns.keys()
        and all(np.array_equal(a.columns[k], b.columns[k]) for k in a.columns)
        and a.errors == b.errors
    )


def test_failed_marks_the_error_rows() -> None:
    assert make_rows(10, 4).failed.tolist() == [False] * 4
    assert make_rows(10, 4, errors={11: "a", 13: "b"}).failed.tolist() == [False, True, False, True]


def test_take_keeps_each_row_together_with_its_error() -> None:
    rows = make_rows(0, 6, errors={1: "one", 4: "four"})
    taken = rows.take(np.array([4, 0]))
    assert taken.index.tolist() == [4, 0]
    assert taken.errors == {4: "four"}
    assert taken.failed.tolist() == [True, False]
    assert np.array_equal(taken.columns["logits"], rows.columns["logits"][[4, 0]])
    assert same(rows.take(rows.index > 2), make_rows(3, 3, errors={4: "four"}))


def test_in_order_interleaves_ranks_up_to_the_frontier() -> None:
    whole = make_rows(20, 10, errors={22: "x", 29: "y"})
    ranks = [whole.take(whole.index % 3 == r) for r in range(3)]
    assert same(in_order(ranks, 100), whole)
    assert same(in_order(ranks, 25), make_rows(20, 5, errors={22: "x"}))
    assert len(in_order(ranks, 20)) == 0


def test_concatenate_passes_over_ranks_without_rows() -> None:
    nothing = Rows(index=np.empty(0, np.int64), label=np.empty(0, np.int32), columns={}, errors={})
    assert same(concatenate([nothing, make_rows(0, 2), nothing, make_rows(2, 3)]), make_rows(0, 5))
    assert len(concatenate([nothing, nothing])) == 0
