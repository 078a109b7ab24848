"""Commands that take turns, and what became of each."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.showing import say

from benching.children import ChildFailedError, Measurement, run_child
from benching.hardware import Hardware, share


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """A command that is measured, on so many GPUs."""

    name: str
    title: str
    command: list[str]
    gpus: int = 1
    rows: int | None = None
    """A job of mgpu_ddp must predict so many."""
    once: bool = False
    """Measured in the first round alone."""


@dataclass(kw_only=True, slots=True)
class Found:
    """The outcome of a contender."""

    measured: list[Measurement] = field(default_factory=list)
    problem: str = ""

    @property
    def wall_s(self) -> list[float]:
        return [m.wall_s for m in self.measured]

    def rates(self, stage: str | None = None) -> list[float]:
        """List the rate of each round; of a stage's several ways, those of the way with the best median."""
        said = [m.said["images_per_s"] for m in self.measured]
        if stage is None:
            return said
        tried = [rates[stage] for rates in said if stage in rates]
        if not tried:
            return []
        best = max(tried[0], key=lambda way: statistics.median(ways[way] for ways in tried))
        return [ways[best] for ways in tried]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounds:
    """How often everything has its turn, and on what."""

    number: int
    hardware: Hardware
    out: Path
    minutes: float = float("inf")
    """No round begins that would end later than this."""
    cpu_shares: int | None = None
    """Where there is no GPU: a rank has one of so many shares of the cores; None for all of them."""
    limit_s: float = 240
    """A contender that takes longer has failed."""


def take_turns(
    contenders: Sequence[Contender],
    found: dict[str, Found],
    rounds: Rounds,
    report: Callable[[], object],
    *,
    warm_up: Sequence[Contender],
) -> None:
    """Measure each contender once a round, and report after each. One that failed has no further turn.

    What warms up fills the caches of files and of compiled kernels, lest who comes later profits from who came before.
    """
    began = time.perf_counter()
    for contender in warm_up:
        say(f"warm-up, {since(began)}: {contender.title}")
        measure(contender, Found(), rounds, rounds.out / "warm-up" / contender.name)
    for number in range(1, rounds.number + 1):
        round_began, once_s = time.perf_counter(), 0.0
        for contender in contenders:
            result = found[contender.name]
            if result.problem or (contender.once and number > 1):
                continue
            say(f"round {number} of {rounds.number}, {since(began)}: {contender.title}")
            measure(contender, result, rounds, rounds.out / f"round-{number}" / contender.name)
            once_s += sum(result.wall_s) * contender.once
            report()
        round_s = time.perf_counter() - round_began - once_s
        if number < rounds.number and time.perf_counter() - began + round_s > rounds.minutes * 60:
            say(f"{since(began)}: no time for round {number + 1}, see --minutes")
            return


def measure(contender: Contender, found: Found, rounds: Rounds, folder: Path) -> None:
    """Run a contender once and note what it reached, or why it did not; the others go on all the same."""
    try:
        with share(rounds.hardware, contender.gpus, cpu_shares=rounds.cpu_shares):
            result = run_child(contender.command, folder, timeout_s=rounds.limit_s)
        said = result.said
        if contender.rows is not None and (said.get("samples"), said.get("ok")) != (contender.rows, contender.rows):
            raise ChildFailedError(f"{folder}: not all of {contender.rows} rows are ok: {json.dumps(said)}")
        if "images_per_s" not in said:
            raise ChildFailedError(f"{folder}: no line of JSON has images_per_s: {json.dumps(said)}")
    except ChildFailedError as error:
        say(str(error))
        found.problem = f"FAILED, see {folder}"
        return
    found.measured.append(result)


def since(began: float) -> str:
    """Name the seconds since then."""
    return f"{time.perf_counter() - began:.0f} s"
