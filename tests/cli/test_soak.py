"""The soak test itself, for a short while: kills at random moments, and not a row lost, duplicates or different."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "scripts" / "soak"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_ten_kills_cost_no_row() -> None:
    command = [sys.executable, str(SOAK), "kills", "--count", "10", "--seconds", "120", "--seed", "7"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=380)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    report = json.loads(ended.stdout.splitlines()[-1])
    assert report["kills"] == sum(report["by"].values())
    assert report["kills"] == 10 or report["out_of_time"]
    assert report["rows"] > 0
    assert (report["missing"], report["duplicates"], report["different"], report["failures"]) == (0, 0, 0, [])
    assert ended.stdout.startswith("killed ")
    assert "\r" not in ended.stderr, "a line that changes is for terminals only"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_nothing_hostile_does_harm() -> None:
    command = [sys.executable, str(SOAK), "hostile", "--count", "36", "--minutes", "3", "--seed", "7"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=380)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    report = json.loads(ended.stdout.splitlines()[-1])
    assert report["tried"].keys() == {"command lines", "files", "tamperings"}
    assert report["failures"] == []
