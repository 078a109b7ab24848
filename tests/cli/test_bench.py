"""The bench itself, with sizes that say nothing of speed: every job runs, and the figures are those of the jobs."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.support.runs import read_table

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(BENCH), *arguments], capture_output=True, text=True, timeout=230)


def test_an_unknown_name_is_one_line() -> None:
    ended = bench("scaling", "--only", "jpegs,png")
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].endswith("--only must name any of jpegs, array, fake, got 'png'.")


@pytest.mark.parametrize("arguments", [("gpu", "--images", "0"), ("startup", "--rounds", "-1")])
def test_a_count_of_none_is_not_the_default(arguments: Sequence[str]) -> None:
    ended = bench(*arguments)
    assert ended.returncode == 2
    said = f"argument {arguments[1]}: must be a whole number of at least 1, got '{arguments[2]}'"
    assert ended.stderr.splitlines()[-1].endswith(said)


def test_what_a_library_says_last_hides_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH.parent))
    from benching.children import last_json

    (tmp_path / "stdout").write_text('{"rows": 1}\n{"rows": 2}\nraylet: submit failed\n')
    assert last_json(tmp_path) == {"rows": 2}
    (tmp_path / "stdout").write_text("nothing\n")
    assert last_json(tmp_path) == {}


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a core for each of 2 ranks")
def test_scaling_compares_each_number_of_ranks_with_one(tmp_path: Path) -> None:
    options = ["--quick", "--gpus", "1,2", "--only", "array", "--images", "24", "--work", str(tmp_path / "work")]
    ended = bench("scaling", *options, "--out", str(tmp_path / "out"))
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    rates = {name: runs[0]["images_per_s"] for name, runs in found["metrics"].items()}
    assert set(rates) == {"array-24-on-1", "array-48-on-1", "array-48-on-2"}, "the scalings meet at the most ranks"
    assert [rank["rows"] for rank in found["metrics"]["array-48-on-2"][0]["ranks"]] == [24, 24]
    ratios = [row["ratio"] for row in found["rows"] if row["ratio"] is not None]
    both = rates["array-48-on-2"]
    assert ratios == pytest.approx([1, both / rates["array-24-on-1"], 1, both / rates["array-48-on-1"]])


@pytest.fixture
def benching(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of scripts/bench accuracy, found as the script finds it."""
    monkeypatch.syspath_prepend(str(BENCH.parent))
    from benching import accuracy

    return accuracy


PROBS = [[0.7, 0.2, 0.1], [0.5, 0.45, 0.05], [0.1, 0.1, 0.8], [0.3, 0.6, 0.1]]


def write_run(
    run: Path, probs: Sequence[Sequence[float]], errors: Sequence[str | None] = (None,) * 4, *, cut: int = 1
) -> Path:
    """A run folder of four rows in two parts, whose names sort the other way round."""
    (run / "predictions").mkdir(parents=True)
    index, values = np.arange(4), np.array(probs, dtype=np.float32)
    columns = {
        "index": pa.array(index),
        "path": pa.array([f"{i}.jpg" for i in index]),
        "label": pa.array([0, 1, 2, 1], type=pa.int32()),
        "pred": pa.array(values.argmax(axis=1).astype(np.int32)),
        "probs": pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1]),
        "error": pa.array(errors, type=pa.string()),
    }
    table = pa.table(columns)
    pq.write_table(table[:cut], run / "predictions" / "part-b.parquet")
    pq.write_table(table[cut:], run / "predictions" / "part-a.parquet")
    return run


def test_tables_are_compared_row_by_row(tmp_path: Path, benching: Any) -> None:
    probs = [[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.1, 0.8], [0.3, 0.58, 0.12]]
    found = benching.compare_tables(write_run(tmp_path / "fp32", PROBS), write_run(tmp_path / "fp16", probs, cut=2))
    assert (found.images, found.changed, found.same_top1) == (4, 1, 0.75)
    assert (found.accuracy, found.reference_accuracy) == (1.0, 0.75)
    # Of the reference's class: 0.1, 0.3, 0 and 0.02 apart, also where the other has another class.
    assert [found.mean, found.p99, found.max] == pytest.approx([0.105, 0.294, 0.3])
    assert found.margin == pytest.approx(0.05), "of the one image whose top-1 differs, in the reference"
    same = benching.compare_tables(tmp_path / "fp32", tmp_path / "fp32")
    assert (same.same_top1, same.max, same.margin) == (1.0, 0.0, 0.0)


def test_tables_of_other_images_or_with_errors_are_not_compared(tmp_path: Path, benching: Any) -> None:
    reference = write_run(tmp_path / "fp32", PROBS)
    failed = write_run(tmp_path / "failed", PROBS, errors=[None, "truncated", None, None])
    with pytest.raises(benching.ChildFailedError, match="has 1 error rows"):
        benching.compare_tables(reference, failed)
    part = tmp_path / "renamed" / "predictions" / "part-a.parquet"
    write_run(tmp_path / "renamed", PROBS)
    table = pq.read_table(part)
    pq.write_table(table.set_column(1, "path", pa.array(["1.jpg", "3.jpg", "2.jpg"])), part)
    with pytest.raises(benching.ChildFailedError, match="differ in path"):
        benching.compare_tables(reference, tmp_path / "renamed")
    part.unlink()
    with pytest.raises(benching.ChildFailedError, match="differ in index"):
        benching.compare_tables(reference, tmp_path / "renamed")


@pytest.mark.parametrize(("same_top1", "met"), [(0.995, True), (0.9949, False)])
def test_the_bar_is_the_defaults_alone(tmp_path: Path, benching: Any, same_top1: float, met: bool) -> None:
    run = write_run(tmp_path / "run", PROBS)
    found = benching.replace(benching.compare_tables(run, run), same_top1=same_top1)
    assert benching.row_of(benching.DEFAULT, found, judged=True).met is met
    assert benching.row_of(benching.DEFAULT, found, judged=False).met is None
    assert benching.row_of("bf16, decode=gpu", found, judged=True).met is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="trains a model: minutes on a GPU, half an hour on two cores")
def test_accuracy_compares_what_a_confident_model_says(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = bench("accuracy", "--quick", "--images", "100", "--work", str(tmp_path / "work"), "--out", str(out))
    assert ended.returncode == 0, ended.stderr
    found = json.loads((out / "bench.json").read_text())
    assert found["confidence"]["accuracy"] > 0.7, "8 classes: it has learned them"
    assert 0.6 < found["confidence"]["mean_prob"] < found["confidence"]["max_prob"] < 1
    reference = read_table(out / "predicted-0" / "run")
    for number, difference in enumerate(found["differences"].values(), start=1):
        other = read_table(out / f"predicted-{number}" / "run")
        # Each class has as many images.
        assert reference["path"].equals(other["path"])
        assert len(other) == difference["images"] == 104
        changed = sum(a != b for a, b in zip(*(t["pred"].to_pylist() for t in (reference, other)), strict=True))
        assert (difference["changed"], difference["same_top1"]) == (changed, pytest.approx(1 - changed / 104))
        assert 0 < difference["mean"] < difference["p99"] <= difference["max"] < 0.1, "bf16 shows"
