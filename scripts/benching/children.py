"""Run commands as whole processes, and read what they say."""

import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.processes import started

PEERS = Path(__file__).resolve().parent.parent / "bench_peers"
CHILD_TIMEOUT_S = 3600


class ChildFailedError(Exception):
    """A measured process failed; the text is what it said last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One run of a command."""

    wall_s: float
    said: dict[str, Any]
    """The last JSON object that stands on a line of its output, empty where there is none."""


def run_child(command: list[str], folder: Path, *, timeout_s: float = CHILD_TIMEOUT_S) -> Measurement:
    """Run a command in a new folder, its output in files there, and time it as a whole.

    Raises:
        ChildFailedError: it did not leave with 0, or not in time.
    """
    began = time.perf_counter()
    with started(command, folder) as child:
        try:
            child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ChildFailedError(f"{' '.join(command)}\ndid not end within {timeout_s:g} s; see {folder}") from None
        wall_s = time.perf_counter() - began
    check_exit(command, folder, child.returncode)
    return Measurement(wall_s=wall_s, said=last_json(folder))


def check_exit(command: list[str], folder: Path, code: int) -> None:
    """Refuse an exit code other than 0.

    Raises:
        ChildFailedError: with the end of what the command printed.
    """
    if code != 0:
        said = "\n".join((folder / name).read_text(errors="replace")[-4000:] for name in ("stdout", "stderr"))
        raise ChildFailedError(f"{' '.join(command)}\nfailed with exit code {code} in {folder}. It said:\n{said}")


def last_json(folder: Path) -> dict[str, Any]:
    """Read the last JSON object that a command has printed."""
    lines = (folder / "stdout").read_text(errors="replace").splitlines()
    # A library's other processes may have the last word.
    return next((dict(json.loads(line)) for line in reversed(lines) if line.startswith("{")), {})
