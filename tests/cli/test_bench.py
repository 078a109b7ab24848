"""The bench itself, with sizes that say nothing of speed: every job runs, and the figures are those of the jobs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(BENCH), *arguments], capture_output=True, text=True, timeout=230)


def test_an_unknown_name_is_one_line() -> None:
    ended = bench("scaling", "--only", "jpegs,png")
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].endswith("--only must name any of jpegs, array, fake, got 'png'.")


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a core for each of 2 ranks")
def test_scaling_compares_each_number_of_ranks_with_one(tmp_path: Path) -> None:
    options = ["--quick", "--gpus", "1,2", "--only", "array", "--images", "24", "--work", str(tmp_path / "work")]
    ended = bench("scaling", *options, "--out", str(tmp_path / "out"))
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    rates = {name: runs[0]["images_per_s"] for name, runs in found["spent"].items()}
    assert set(rates) == {"array-24-on-1", "array-48-on-1", "array-48-on-2"}, "the scalings meet at the most ranks"
    assert [rank["rows"] for rank in found["spent"]["array-48-on-2"][0]["ranks"]] == [24, 24]
    ratios = [row["ratio"] for row in found["rows"] if row["ratio"] is not None]
    both = rates["array-48-on-2"]
    assert ratios == pytest.approx([1, both / rates["array-24-on-1"], 1, both / rates["array-48-on-1"]])
    assert (tmp_path / "out" / "scaling.png").stat().st_size > 0
