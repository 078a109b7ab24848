"""One CPU-only machine against the tutorial's script and bare loops; memory over a long run."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benching.children import (
    PEERS,
    ChildFailedError,
    Competitor,
    Measurement,
    check_exit,
    environment,
    last_json,
    rank_0_below,
    run_child,
    say,
    stat_fields,
    torchrun,
)
from benching.table import Row, compare, print_machine, print_table, write_report

SAMPLE_EVERY_S = 0.05
TRIES = 3
"""Of a run that others on the machine disturb."""
LATE_IMPORTS = ("pyarrow", "matplotlib", "torchvision")
"""What `import mgpu_ddp.infer` must leave for later."""


def take_turns(
    competitors: Sequence[Competitor], rounds: int, out: Path, max_noise: float
) -> dict[str, list[Measurement]]:
    """Run all competitors one after another, `rounds` times after a round that only warms up.

    A run that others disturbed by more than `max_noise` cores is repeated, up to `TRIES` times; the quietest counts.
    """
    measured: dict[str, list[Measurement]] = {competitor.name: [] for competitor in competitors}
    for number in range(rounds + 1):
        for place, competitor in enumerate(competitors):
            tries: list[Measurement] = []
            while len(tries) < (TRIES if number else 1) and all((t.others_cores or 0) > max_noise for t in tries):
                result = run_child(competitor.command, out / f"round-{number}" / f"{place}-{len(tries)}")
                tries.append(result)
                others = f", others used {result.others_cores:.2f} cores" if result.others_cores is not None else ""
                label = f"round {number} of {rounds}" if number else "warm-up"
                say(f"{label}: {competitor.name} {result.wall_s:.2f} s{others}")
            if number > 0:
                measured[competitor.name].append(min(tries, key=lambda t: t.others_cores or 0))
    return measured


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """The resident memory of a process at one moment of its life. Source: proc(5), /proc/PID/status."""

    age_s: float
    rss_bytes: int
    anonymous_bytes: int
    """The part that no file and no shared memory backs."""


def watch_memory(command: list[str], folder: Path, *, torchrun: bool) -> tuple[list[Sample], dict[str, Any]]:
    """Run a job and sample rank 0's memory until it ends; with the JSON line it printed.

    Raises:
        ChildFailedError: it did not leave with 0.
    """
    folder.mkdir(parents=True)
    samples: list[Sample] = []
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        child = subprocess.Popen(command, cwd=folder, env=environment(), stdout=out, stderr=err)
        try:
            pid = None if torchrun else child.pid
            while child.poll() is None:
                pid = pid or rank_0_below(child.pid)
                if pid is not None and (sample := _sample(pid)) is not None:
                    samples.append(sample)
                time.sleep(SAMPLE_EVERY_S)
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
    check_exit(command, folder, child.returncode)
    return samples, last_json(folder)


def _sample(pid: int) -> Sample | None:
    folder = Path("/proc") / str(pid)
    try:
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - int(stat_fields(folder)[19]) / os.sysconf("SC_CLK_TCK")
        lines = (folder / "status").read_text().splitlines()
    except OSError:
        return None
    sizes = {key: int(text.split()[0]) * 1024 for key, _, text in (x.partition(":") for x in lines) if "kB" in text}
    if "VmRSS" not in sizes:
        return None  # a process that has ended and waits to be reaped
    return Sample(age_s=age_s, rss_bytes=sizes["VmRSS"], anonymous_bytes=sizes.get("RssAnon", 0))


def measure_memory(command: list[str], folder: Path, *, torchrun: bool) -> dict[str, Any]:
    """Measure rank 0's resident memory in the first and in the last tenth of its batches, as medians."""
    samples, said = watch_memory(command, folder, torchrun=torchrun)
    metrics = json.loads((Path(said["run_dir"]) / "metrics.json").read_text())
    rank_0 = metrics["ranks"][0]
    begin_s, end_s = rank_0["startup_s"], rank_0["wall_s"]
    tenth_s = (end_s - begin_s) / 10
    first = [s for s in samples if begin_s <= s.age_s <= begin_s + tenth_s]
    last = [s for s in samples if end_s - tenth_s <= s.age_s <= end_s]
    if not first or not last:
        raise ChildFailedError(f"{folder} must last long enough to be sampled, got {end_s - begin_s:.2f} s of batches.")
    return {
        "wall_s": end_s,
        "images_per_s": metrics["images_per_s"],
        "first_tenth_mib": statistics.median(s.rss_bytes for s in first) / 2**20,
        "last_tenth_mib": statistics.median(s.rss_bytes for s in last) / 2**20,
        "first_tenth_anonymous_mib": statistics.median(s.anonymous_bytes for s in first) / 2**20,
        "last_tenth_anonymous_mib": statistics.median(s.anonymous_bytes for s in last) / 2**20,
        "samples": [[round(s.age_s, 2), s.rss_bytes >> 20] for s in samples],
    }


def compare_memory(name: str, measured: Sequence[dict[str, Any]]) -> Row:
    """The row of memory that must stay within 10 % in every single run."""
    ratios = [m["last_tenth_mib"] / m["first_tenth_mib"] for m in measured]
    first, last = (statistics.median(m[key] for m in measured) for key in ("first_tenth_mib", "last_tenth_mib"))
    return Row(
        name=name,
        wall_s=[m["wall_s"] for m in measured],
        value=f"{first:.0f} -> {last:.0f} MiB",
        ratio=statistics.median(ratios),
        rounds=ratios,
        bar="0.9 to 1.1, each",
        met=all(0.9 <= ratio <= 1.1 for ratio in ratios),
    )


def check_imports() -> Row:
    """See what `import mgpu_ddp.infer` brings in at once."""
    code = f"import sys, mgpu_ddp.infer; print(*sorted(set({LATE_IMPORTS!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    early = done.stdout.split()
    return Row(
        name="imported by mgpu_ddp.infer",
        value=", ".join(early) or "none",
        bar=f"not {', '.join(LATE_IMPORTS)}",
        met=not early,
    )


def cpu(args: argparse.Namespace) -> bool:
    """One CPU-only machine: FakeData (3, 224, 224) through ResNet18, batches of 32."""
    images = args.images or (480 if args.quick else 1000)
    rounds = args.rounds or (1 if args.quick else 3)
    tiny_rows = 3000 if args.quick else 20_000
    infer = ["-m", "mgpu_ddp.infer", "runtime.device=cpu"]
    job = [*infer, f"data.size={images}"]
    bare = [sys.executable, str(PEERS / "bare.py"), f"--images={images}"]
    tutorial = Competitor(
        name="the tutorial's script",
        command=[sys.executable, str(PEERS / "tutorial.py"), str(images), "2"],
    )
    one = Competitor(name="python -m mgpu_ddp.infer", command=[sys.executable, *job])
    compiled = Competitor(name="one process, compiled", command=[*one.command, "runtime.compile=on"])
    two = Competitor(name="torchrun, 2 processes", command=[*torchrun(2), *job])
    loop = Competitor(name="bare channels_last loop", command=bare)
    ceiling = Competitor(name="bare loop, folded, a batch per thread", command=[*bare, "--fold", "--pool"])

    measured = take_turns([tutorial, one, compiled, two, loop, ceiling], rounds, args.out, args.max_noise)

    def walls(competitor: Competitor) -> list[float]:
        return [m.wall_s for m in measured[competitor.name]]

    def rates(competitor: Competitor) -> list[float]:
        return [images / wall_s for wall_s in walls(competitor)]

    def steady(competitor: Competitor) -> list[float]:
        return [m.said["images_per_s"] for m in measured[competitor.name]]

    def bar(value: float) -> float | None:
        return None if args.quick else value

    rows = [
        Row(name=tutorial.name, wall_s=walls(tutorial), value=f"{statistics.median(rates(tutorial)):.1f} images/s"),
        compare(one.name, rates(one), rates(tutorial), bar=bar(1.0), wall_s=walls(one)),
        compare(two.name, rates(two), rates(tutorial), bar=bar(0.9), wall_s=walls(two)),
        compare("one process, steady, of the tutorial's", steady(one), steady(tutorial), bar=bar(1.4)),
        compare("one process, compiled, of the same", steady(compiled), steady(tutorial), bar=bar(1.6)),
        Row(name=loop.name, value=f"{statistics.median(steady(loop)):.1f} images/s"),
        compare("one process, steady, of that", steady(one), steady(loop), bar=bar(0.95)),
        Row(name=ceiling.name, value=f"{statistics.median(steady(ceiling)):.1f} images/s"),
        compare("one process, steady, of that", steady(one), steady(ceiling)),
        compare("2 processes, steady, of that", steady(two), steady(ceiling)),
    ]
    memory: dict[str, Any] = {}
    for processes in (1, 2):
        name = f"memory of rank 0 of {processes}, first to last tenth"
        start = [sys.executable] if processes == 1 else torchrun(processes)
        command = [*start, *infer, *_tiny(tiny_rows)]
        memory[name] = [
            measure_memory(command, args.out / f"memory-{processes}-{number}", torchrun=processes > 1)
            for number in range(rounds)
        ]
        rows.append(compare_memory(name, memory[name]))
    rows.append(check_imports())

    print_table(rows)
    settings = {"images": images, "rounds": rounds, "memory_rows": tiny_rows, "max_noise": str(args.max_noise)}
    turns = {name: [asdict(m) for m in results] for name, results in measured.items()}
    noise = [m.others_cores for results in measured.values() for m in results if m.others_cores is not None]
    if noise:
        print(f"\nnoise: other processes used {statistics.median(noise):.2f} cores, at most {max(noise):.2f}")
    write_report(args.out, settings, rows, {"turns": turns, "memory": memory})
    print_machine(args.out)
    return True


def _tiny(rows: int) -> Iterator[str]:
    """Settings of a long run with wide rows and next to no model."""
    yield from (f"data.size={rows}", "data.image_size=[3,32,32]", "transform.size=32", "model.name=squeezenet1_1")
    yield "output.fields=[topk,logits]"
