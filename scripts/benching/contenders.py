"""What is measured and what became of it, round by round."""

import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from benching.children import ChildFailedError, Measurement, run_child, say
from benching.hardware import Hardware, share

CHILD_LIMIT_S = 240


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """Something that is measured: a command, on so many GPUs."""

    name: str
    title: str
    gpus: int
    command: list[str]
    rows: int | None = None
    """What a job of mgpu_ddp must predict."""
    peer: bool = False


@dataclass(kw_only=True, slots=True)
class Found:
    """What became of a contender."""

    measured: list[Measurement] = field(default_factory=list)
    problem: str = ""

    def rates(self, stage: str | None = None) -> list[float]:
        """Of each round; a stage's are those of the way to go through it that has the best median."""
        said = [m.said["images_per_s"] for m in self.measured]
        if stage is None:
            return said
        tried = [rates[stage] for rates in said if stage in rates]
        if not tried:
            return []
        best = max(tried[0], key=lambda way: statistics.median(ways[way] for ways in tried))
        return [ways[best] for ways in tried]


def measure(
    contender: Contender, found: Found, hardware: Hardware, folder: Path, *, cpu_shares: int | None = None
) -> None:
    """Run a contender once and note what it reached, or why it did not; the others go on all the same.

    Without GPUs it has all cores, or one of `cpu_shares` shares for each rank.
    """
    try:
        with share(hardware, contender.gpus, cpu_shares=cpu_shares):
            result = run_child(contender.command, folder, timeout_s=CHILD_LIMIT_S)
        said = result.said
        if contender.rows is not None and (said.get("samples"), said.get("ok")) != (contender.rows, contender.rows):
            raise ChildFailedError(f"{folder}: {contender.rows} rows must be ok, got {json.dumps(said)}")
        if "images_per_s" not in said:
            raise ChildFailedError(f"{folder}: a line of JSON must say images_per_s, got {json.dumps(said)}")
    except ChildFailedError as error:
        say(str(error))
        found.problem = f"FAILED, see {folder}"
        return
    found.measured.append(result)


def since(started: float) -> str:
    return f"{time.perf_counter() - started:.0f} s"


def goes_on(number: int, rounds: int, started: float, round_s: float, minutes: float) -> bool:
    """Whether another round follows, one that would end within so many minutes of the start."""
    if number == rounds:
        return False
    fits = time.perf_counter() - started + round_s <= minutes * 60
    if not fits:
        say(f"{since(started)}: no time for round {number + 1}, see --minutes")
    return fits
