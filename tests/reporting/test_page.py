"""HTML that nothing can break out of, and the charts' numbers."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from mgpu_ddp.inference.clock import PACE_POINTS, Clock
from mgpu_ddp.reporting import page_sections
from mgpu_ddp.reporting.class_table import Classes
from mgpu_ddp.reporting.markup import Html, document, foreign, plot, table, tag
from mgpu_ddp.reporting.metrics import MAX_BINS, RankMetrics, throughput
from mgpu_ddp.reporting.table_stats import BINS, Tally


def test_what_is_not_markup_is_escaped() -> None:
    assert tag("b", "<i>", Html("<u>"), 3, title='"><i>') == '<b title="&quot;&gt;&lt;i&gt;">&lt;i&gt;<u>3</b>'
    assert table(["a<"], [["b<"]]).count("&lt;") == 2
    assert "<x>" not in plot([1], top="<x>", left="<x>", right="<x>", title="<x>", as_line=True)
    assert foreign("a\n\x1b\u202e\udcff\0") == f"<bdi>a{5 * chr(0xFFFD)}</bdi>"
    assert len(foreign("<" * 10_000)) < 2000
    assert "<script" not in document("</title><script>", "<script>")


def test_a_page_of_many_long_names_stays_small() -> None:
    """Every list that the input makes long is cut."""
    many = 21_000
    name = "</title>" * 10_000
    classes = Classes(num_classes=many, names=(name,) * many, label_names=(name,) * many, num_labels=many)
    ones = np.ones(many, np.int64)
    counted = Tally(
        preds=ones,
        confidence=np.arange(BINS),
        labelled=many,
        how="by name",
        compared=ones,
        top1=ones,
        top5=ones,
        picked=[],
    )
    text = document("x", page_sections.accuracy(counted, classes), page_sections.classes(counted, classes))
    assert len(text) < 1_000_000
    assert "200 of 21,000 classes" in text
    assert "20,980 other classes" in text


def test_the_errors_of_a_page_are_some_of_them(tmp_path: Path) -> None:
    (tmp_path / "errors.jsonl").write_text('{"index": 1, "path": "<p>", "reason": "E<x>: y"}\n' * 5000)

    class Failed:
        errors = 5000

    text = page_sections.errors(tmp_path, Failed())  # type: ignore[arg-type]
    assert "<p>&lt;" not in text
    assert "<td><bdi>E&lt;x&gt;</bdi></td>" in text
    assert "4,950 more are in errors.jsonl" in text


@pytest.mark.parametrize("batches", [0, 1, 2, 100, 5000])
def test_the_pace_of_a_job_is_kept_in_a_bounded_number_of_points(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(warm_up=1, began=100.0, started=100.0)
    for i in range(batches):
        monkeypatch.setattr("time.perf_counter", lambda now=100.5 + 0.1 * i: now)
        clock.batch(4, {})
        assert len(clock.pace) < PACE_POINTS
    if not batches:
        return
    values = dict.fromkeys((item.name for item in fields(RankMetrics)), 0)
    pace = [*clock.pace, (clock.ended - clock.began, clock.rows)]
    found = throughput([RankMetrics(**values | {"pace": pace})] * 3)  # type: ignore[arg-type]
    assert len(found["rows"]) <= MAX_BINS
    # After the first batch of each rank.
    assert sum(found["rows"]) == pytest.approx(3 * 4 * (batches - 1), abs=0.05 * MAX_BINS)
    if batches > 100:
        rates = np.array(found["rows"]) / found["bin_s"]
        assert rates == pytest.approx(np.full(len(rates), 120.0), rel=0.02)
