"""The soak test itself, for a short while: kills at random moments, and not a row lost, duplicates or different."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SOAK = Path(__file__).parents[2] / "scripts" / "soak"


def soak(*words: str) -> dict[str, Any]:
    command = [sys.executable, str(SOAK), *words, "--seed", "7"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=380)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    assert "\r" not in ended.stderr, "a line that changes is for terminals only"
    return dict(json.loads(ended.stdout.splitlines()[-1]))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_ten_kills_cost_no_row() -> None:
    report = soak("kills", "--count", "10", "--seconds", "120")
    assert report["kills"] == sum(report["by"].values())
    assert report["kills"] == 10 or report["out_of_time"]
    assert report["rows"] > 0
    assert (report["missing"], report["duplicates"], report["different"], report["failures"]) == (0, 0, 0, [])


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_nothing_hostile_does_harm() -> None:
    report = soak("hostile", "--count", "24", "--minutes", "3")
    assert report["tried"].keys() == {"command lines", "files", "tamperings"}
    assert report["failures"] == []
