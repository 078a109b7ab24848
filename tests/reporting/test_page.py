"""Templates that nothing breaks out of, sections that stay short, and the throughput behind a page's plot."""

import base64
import hashlib
import json
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from jinja2 import UndefinedError

from mgpu_ddp.inference.clock import PACE_POINTS, Clock
from mgpu_ddp.output.manifest import Part, Start
from mgpu_ddp.reporting import page_sections
from mgpu_ddp.reporting.class_table import ClassTable
from mgpu_ddp.reporting.metrics import MAX_BINS, RankMetrics, throughput
from mgpu_ddp.reporting.picked_rows import PickedRows
from mgpu_ddp.reporting.render import TEMPLATES, render
from mgpu_ddp.reporting.table_stats import BINS, TableStats
from tests.support.run_folders import wanted

SUMMARY: dict[str, Any] = {
    "model": "m",
    "source": "s",
    "device": "d",
    "precision": "p",
    "folder": "f",
    "provenance": {},
    "notices": [],
    "cards": [],
}
EMPTY: dict[str, Any] = {
    **dict.fromkeys(("throughput", "stages", "accuracy", "classes", "samples", "errors", "starts")),
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
    sample = {
        "name": '" onload="alert(1)',
        "thumbnail": '"><script>',
        "class_name": "<b>",
        "prob": 0.5,
        "columns": ["<i>"],
        "label": "<u>",
        "is_right": False,
    }
    samples = {"spread": [sample], "classes": [], "left_out": 0, "in_haste": False, "unreadable": 0}
    text = render("job.html", **EMPTY | {"throughput": in_attributes, "samples": samples})
    assert 'alt="&#34; onload=&#34;alert(1)" src="&#34;&gt;&lt;script&gt;"' in text
    for name in ("b", "i", "u"):
        assert f"<bdi>&lt;{name}&gt;" in text
    assert "<script" not in text


def test_the_only_script_is_the_filter_of_errors_which_the_policy_names(tmp_path: Path) -> None:
    (tmp_path / "errors.jsonl").write_text('{"index": 1, "path": "</script><script>x", "reason": "<script>: y"}\n')
    failed: Any = SimpleNamespace(errors=1)
    text = render("job.html", **EMPTY | {"errors": page_sections.errors(tmp_path, failed)})
    (script,) = re.findall(r"<script.*?>(.*?)</script>", text, re.DOTALL)
    assert script == (TEMPLATES / "filter.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in text.split("<title>")[0]
    assert "script-src" not in render("job.html", **EMPTY)


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
        picked=PickedRows(0, many, many),
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
    assert "4,900 more in errors.jsonl" in text


def test_an_error_of_a_rare_kind_is_among_those_shown(tmp_path: Path) -> None:
    lines = ['{"index": 1, "path": "p", "reason": "Common: y"}\n'] * 5000
    lines[4000] = '{"index": 4000, "path": "rare.jpg", "reason": "Rare: y"}\n'
    (tmp_path / "errors.jsonl").write_text("".join(lines))
    failed: Any = SimpleNamespace(errors=5000)
    found = page_sections.errors(tmp_path, failed)
    assert found is not None
    assert found["kinds"] == [("Common", 4999), ("Rare", 1)]
    assert [row["path"] for row in found["rows"] if row["reason"] == "Rare: y"] == ["rare.jpg"]


def test_long_errors_of_many_kinds_are_cut_as_well(tmp_path: Path) -> None:
    long = "\N{SNOWMAN}" * 5000
    lines = [json.dumps({"index": i, "path": long, "reason": f"Kind{i}: {long}"}) + "\n" for i in range(2000)]
    (tmp_path / "errors.jsonl").write_text("".join(lines))
    failed: Any = SimpleNamespace(errors=2000)
    text = render("job.html", **EMPTY | {"errors": page_sections.errors(tmp_path, failed)})
    assert len(text.encode()) < 700_000


def test_a_curve_is_drawn_where_there_is_one() -> None:
    def bins(number: int) -> dict[str, Any]:
        return {"throughput": {"from_s": 1.0, "bin_s": 0.5, "rows": [4.0] * number}}

    assert page_sections.throughput({}) is None
    assert page_sections.throughput(bins(2)) is None
    found = page_sections.throughput(bins(20))
    assert found is not None
    assert (found["begin_s"], found["end_s"], found["images_per_s"][0]) == (1.0, 11.0, 8.0)


def test_starts_are_listed_where_there_are_several() -> None:
    def start(number: int) -> Start:
        return Start(began=60.0 * number, ranks=2, wall_s=30.0, rows=60)

    assert page_sections.starts(wanted(starts=[start(0)])) is None
    found = page_sections.starts(wanted(starts=[start(i) for i in range(50)]))
    assert found is not None
    assert [row["number"] for row in found["rows"]] == list(range(31, 51))
    text = render("job.html", **EMPTY | {"starts": found})
    assert "<td>1970-01-01 00:49 UTC</td>" in text
    assert 'all 50 starts</th><td class="n">3,000</td><td class="n">0:25:00</td><td class="n">2.0</td>' in text


@pytest.mark.parametrize(
    ("wall_s", "metrics", "expected"),
    [
        ([], {}, []),
        ([], {"images_per_s": 2.0, "wall_s": 7.0}, [("images/s, steady", "2.0"), ("time", "7.0 s")]),
        ([3.0], {}, [("time", "3.0 s")]),
        ([3.0, 5.0], {}, [("time of all 2 starts", "8.0 s"), ("time of the last start", "5.0 s")]),
    ],
    ids=["shards that were merged", "older version", "killed", "resumed and killed"],
)
def test_the_time_of_all_starts_is_told_however_they_ended(
    wall_s: list[float], metrics: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    manifest = wanted(starts=[Start(began=0.0, ranks=1, wall_s=each) for each in wall_s])
    summary = page_sections.summary(manifest, None, {"status": "running"}, metrics, Path("run"))
    assert summary["cards"][3:] == expected


def test_what_a_reader_should_not_miss_stands_on_top() -> None:
    part = Part(file="predictions.npy", first=0, rows=8, errors=1, num_bytes=9, sha256="", split_rows=1)
    manifest = wanted("npy", parts=[part], starts=[Start(began=0.0, ranks=1, rows=4)])
    found = page_sections.notices(manifest, {"reason": "it <stopped>"}, {"nonfinite": 2})
    assert found == [
        "it <stopped>",
        "2 rows with NaN or Inf in the outputs, recorded as errors",
        "1 row predicted in smaller batches, for lack of memory",
        "earlier starts were not timed: times and rates are of the later ones",
    ]
    text = render("job.html", **EMPTY | {"summary": SUMMARY | {"notices": found}})
    assert '<p class="notice"><bdi>it &lt;stopped&gt;</bdi></p>' in text.split("<h2>")[0]
    assert page_sections.notices(wanted(), {}, {}) == []


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
