"""Hostile command lines, files and tamperings, made from a seed: what each did that it must not."""

import json
import os
import random
import shutil
import stat
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import count
from pathlib import Path

from common.showing import Progress, print_columns

from soaking.hostile_files import Files
from soaking.hostile_lines import Lines
from soaking.hostile_trial import Trial
from soaking.tally import Soak
from soaking.tampering import Tamperings
from tests.support.starting import Forks, started

LIMIT_S = 10.0
"""A job that takes longer hangs: every job here is a matter of a second or two."""
SIDE_BY_SIDE = 2
SHARES = {"command lines": 6, "files": 2, "tamperings": 4}
"""How often each kind is tried, of twelve times."""
EXIT_CODES = {0, 1, 2, 3}
SAID = ("stdout.txt", "stderr.txt")
VERDICTS = ("ran code", "harmed", "wrong tables", "tracebacks", "hangs", "other")


@dataclass
class Counts:
    """All that was tried, and what it did that it must not, by kind."""

    trials: int = 0
    tried: Counter[str] = field(default_factory=Counter)
    found: Counter[tuple[str, str]] = field(default_factory=Counter)
    codes: Counter[tuple[str, int]] = field(default_factory=Counter)
    slowest_s: float = 0.0
    failures: list[str] = field(default_factory=list)


def soak_hostile(soak: Soak) -> bool:
    """Try so many hostile things until the time is over, and print what was counted. True where nothing failed."""
    progress, counts = Progress("trials", soak.count, soak.seconds), Counts()
    makers = {"command lines": Lines(soak.work), "files": Files(soak.work), "tamperings": Tamperings(soak.work)}
    before = state_of(soak.work)

    def attempt(kind: str, number: int) -> None:
        if progress.out_of_time:
            return
        folder = soak.work / f"{kind.replace(' ', '-')}-{number}"
        folder.mkdir()
        trial = makers[kind].make(random.Random(f"{soak.seed}/{kind}/{number}"), folder)
        found = list(judge(trial, folder, counts, kind))
        counts.tried[kind] += trial.size
        for verdict, text in found:
            counts.found[kind, verdict] += 1
            counts.failures.append(f"{folder.name} ({trial.what}): {verdict}: {text}")
            progress.say(f"FAILED {counts.failures[-1]}")
        if not found:
            shutil.rmtree(folder)
        counts.trials += 1
        progress.show(counts.trials, f"{len(counts.failures)} failures")

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        list(pool.map(attempt, *zip(*_plan(soak.count), strict=True)))
    after = state_of(soak.work)
    for path in [path for path, was in before.items() if after.get(path) != was]:
        counts.found["files", "harmed"] += 1
        counts.failures.append(f"{path} was changed by somebody")
    return report(counts, soak, progress)


def _plan(trials: int) -> Iterator[tuple[str, int]]:
    """Kinds in turn, each with its own number, so that a trial can be repeated from the seed alone."""
    turn = [kind for kind, share in SHARES.items() for _ in range(share)]
    numbers = {kind: count() for kind in SHARES}
    return ((turn[i % len(turn)], next(numbers[turn[i % len(turn)]])) for i in range(trials))


def judge(trial: Trial, folder: Path, counts: Counts, kind: str) -> Iterator[tuple[str, str]]:
    """Run the commands of a trial, and tell what is wrong with how they end and with what they leave."""
    work = folder / "work"
    work.mkdir(exist_ok=True)
    before, since, words = state_of(folder), time.monotonic(), trial.command.arguments
    code = run(trial.command, work, trial.environ | {"HOME": str(folder / "home")})
    counts.slowest_s = max(counts.slowest_s, time.monotonic() - since)
    said, err = ((work / name).read_text(errors="surrogateescape") for name in SAID)
    refused = code == 2 and trial.leaves_nothing
    if code is None:
        yield "hangs", f"{LIMIT_S:.0f} s of {words}"
    elif "Traceback" in err + said or code not in EXIT_CODES:
        yield "tracebacks", f"exit code {code} of {words}: {err[-200:]}"
    else:
        counts.codes[kind, code] += 1
        if refused and err.count("mgpu_ddp: ") != 1:
            yield "other", f"{len(err.splitlines())} lines for a refusal of {words}"
        if text := trial.wrong(code):
            yield "wrong tables", f"{text} after {words}"
    if {"\x1b", "\x07"} & set(err + said):
        yield "other", f"controls reach the terminal by {words}"
    if (folder / "marker").exists():
        yield "ran code", str(words)
    after = state_of(folder)
    changed = [path for path, was in before.items() if not trial.may_change(path) and after.get(path) != was]
    made = [path for path in after.keys() - before.keys() if not path.startswith("home")]
    made = [path for path in made if refused or not trial.may_make(path)]
    if changed or made:
        yield "harmed", f"changed {sorted(changed)[:3]}, made {sorted(made)[:3]} by {words}"


def run(command: Forks, work: Path, environ: dict[str, str]) -> int | None:
    """Run a command to its end; the exit code, None if it hangs."""
    command = replace(command, environs=[each | environ for each in command.environs])
    with started(command, work) as process:
        try:
            return process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            return None


def state_of(folder: Path) -> dict[str, str]:
    """The content of every file below a folder and the kind of everything else, by path."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.name in SAID:
            continue
        with suppress(FileNotFoundError):
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                found[name] = os.readlink(path)
            elif stat.S_ISREG(mode):
                found[name] = sha256(path.read_bytes()).hexdigest() if path.stat().st_size < 1 << 26 else "large"
            else:
                found[name] = stat.filemode(mode)[0]
    return found


def report(counts: Counts, soak: Soak, progress: Progress) -> bool:
    """Print the table and the JSON line. True where nothing failed."""
    progress.end()
    rows = [(kind, counts.tried[kind], *(counts.found[kind, verdict] for verdict in VERDICTS)) for kind in SHARES]
    print_columns([("", "tried", *VERDICTS), *rows])
    said = {
        "mode": soak.mode,
        "seed": soak.seed,
        "seconds": round(progress.elapsed_s, 1),
        "tried": dict(counts.tried),
        "exit_codes": {f"{kind}, {code}": times for (kind, code), times in sorted(counts.codes.items())},
        "slowest_s": round(counts.slowest_s, 1),
        **{verdict.replace(" ", "_"): sum(counts.found[kind, verdict] for kind in SHARES) for verdict in VERDICTS},
        "failures": counts.failures,
    }
    print(json.dumps(said), flush=True)
    return not counts.failures
