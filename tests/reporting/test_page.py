"""Templates that nothing breaks out of, sections that stay short, and the throughput behind a page's plot."""

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from jinja2 import UndefinedError

from mgpu_ddp.inference.clock import PACE_POINTS, Clock
from mgpu_ddp.reporting import page_sections
from mgpu_ddp.reporting.class_table import ClassTable
from mgpu_ddp.reporting.metrics import MAX_BINS, RankMetrics, throughput
from mgpu_ddp.reporting.render import render
from mgpu_ddp.reporting.table_stats import BINS, TableStats

SUMMARY = {"model": "m", "source": "s", "device": "d", "precision": "p", "folder": "f", "reason": None, "cards": []}
EMPTY: dict[str, Any] = {
    **dict.fromkeys(("throughput", "stages", "accuracy", "classes", "samples", "errors")),
    "title": "t",
    "summary": SUMMARY,
    "setup": {"machines": [], "facts": []},
}


def test_text_from_outside_is_escaped_cleaned_and_shortened() -> None:
    hostile = SUMMARY | {"model": "a\n\x1b\u202e\udcff\0", "source": "<b>\"'&" * 100, "cards": [("<i>", "<u>")]}
    text = render("job.html", **EMPTY | {"summary": hostile, "title": "</title><script>"})
    assert f"<h1><bdi>a{5 * chr(0xFFFD)}</bdi> over <bdi>&lt;b&gt;&#34;&#39;&amp;&lt;b" in text
    assert text.count("&amp;") == 2 * 150 // len("<b>\"'&")
    assert "&lt;i&gt;<b>&lt;u&gt;</b>" in text
    assert "<script" not in text
    in_attributes = {"images_per_s": [1.0], "begin_s": 0.0, "end_s": 1.0}
    sample = {"name": "n", "thumbnail": '"><script>', "failed": True, "label": None}
    text = render("job.html", **EMPTY | {"throughput": in_attributes, "samples": [sample]})
    assert 'src="&#34;&gt;&lt;script&gt;"' in text


def test_a_template_that_asks_for_what_is_not_there_fails() -> None:
    with pytest.raises(UndefinedError, match="title"):
        render("job.html", **{key: value for key, value in EMPTY.items() if key != "title"})


def test_a_page_of_many_long_names_stays_small() -> None:
    """Every list that the input makes long is cut."""
    many = 21_000
    name = "</title>" * 10_000
    classes = ClassTable(num_classes=many, names=(name,) * many, label_names=(name,) * many, num_labels=many)
    ones = np.ones(many, np.int64)
    stats = TableStats(
        preds=ones,
        confidence=np.arange(BINS),
        labelled=many,
        how="by name",
        compared=ones,
        top1=ones,
        top5=ones,
        picked=[],
    )
    sections = {
        "accuracy": page_sections.accuracy(stats, classes),
        "classes": page_sections.predicted_classes(stats, classes),
    }
    text = render("job.html", **EMPTY | sections)
    assert len(text) < 1_000_000
    assert "200 of 21,000 labels" in text
    assert "20,980 other classes" in text


def test_the_errors_of_a_page_are_some_of_them(tmp_path: Path) -> None:
    (tmp_path / "errors.jsonl").write_text('{"index": 1, "path": "<p>", "reason": "E<x>: y"}\n' * 5000)
    failed: Any = SimpleNamespace(errors=5000)
    text = render("job.html", **EMPTY | {"errors": page_sections.errors(tmp_path, failed)})
    assert "<td><bdi>&lt;p&gt;</bdi></td>" in text
    assert '<td><bdi>E&lt;x&gt;</bdi></td><td class="n">5,000</td>' in text
    assert "4,950 more in errors.jsonl" in text


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
