"""The terminal: log and progress while a job runs, then a table for people and a JSON line for scripts."""

import json
import logging
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch

from mgpu_ddp.config.resolved import RANDOM, Resolved
from mgpu_ddp.data.image_names import describe
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import plural
from mgpu_ddp.output.parts import write_error
from mgpu_ddp.reporting.metrics import RankMetrics
from mgpu_ddp.reporting.terminal import OneLine, print_lines
from mgpu_ddp.reporting.text import RANDOM_WEIGHTS, duration, hours_minutes_seconds

log = logging.getLogger("mgpu_ddp")

RANK_COLUMNS = ("rows", "images/s", "load wait", "gpu input", "predict", "peers wait", "gather", "write")
MAX_RANKS_SHOWN = 32


def start_logging(world: World) -> None:
    """Log INFO from rank 0 and warnings from every other rank, all on stderr: stdout is for results."""
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if world.rank == 0 else f"[rank {world.rank}] "
    handler.setFormatter(OneLine(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    handler.setLevel(logging.INFO if world.rank == 0 else logging.WARNING)
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    # A full disk must not print a traceback for every line of the log file.
    logging.raiseExceptions = False


@contextmanager
def log_into(run_dir: Path, world: World) -> Iterator[None]:
    """On rank 0, log into RUN/logs/rank0.log as well while the block runs; elsewhere do nothing."""
    if world.rank != 0:
        yield
        return
    try:
        (run_dir / "logs").mkdir(exist_ok=True)
        handler = logging.FileHandler(run_dir / "logs" / "rank0.log")
    except OSError as error:
        raise write_error(run_dir / "logs", error) from error
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


def log_plan(world: World, resolved: Resolved, model_bytes: int, batch_bytes: int) -> None:
    """Log the devices, what `auto` chose and whether model and batch fit."""
    log.info("preprocessing: %s", resolved.transform)
    smaller = " (JPEGs come smaller, so their pixels differ from cpu's)" if resolved.decode == "scaled" else ""
    chose = f"precision {resolved.precision}, decode {resolved.decode}{smaller}, compile {resolved.compile}"
    if world.device.type == "cpu":
        processes = "1 process" if world.size == 1 else f"{world.size} processes"
        threads = plural(world.share_of_cpus, "thread")
        log.info("CUDA not used: %s with %s on the CPU; %s", processes, threads, chose)
        return
    free, total = torch.cuda.mem_get_info(world.device)
    name = torch.cuda.get_device_name(world.device)
    fit = "fit" if model_bytes + batch_bytes < free else "DO NOT FIT: lower batch_size"
    sizes = f"model {model_bytes / 2**20:.0f} MiB and batch {batch_bytes / 2**20:.0f} MiB {fit}"
    memory = f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    processes = f"1 process on one {name}" if world.size == 1 else f"{world.size} processes, one {name} each"
    log.info("CUDA available: %s, %s; %s; %s", processes, memory, sizes, chose)


class Progress:
    """Show rows of all ranks, rate and time left, from the ranks' heartbeats. On rank 0; elsewhere do nothing."""

    def __init__(self, world: World, total: int, done_before: int) -> None:
        self._world, self._total, self._before = world, total, done_before
        self._stream: TextIO = sys.stderr
        self._bar = self._stream.isatty()
        self._started = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> "Progress":
        if self._world.rank == 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._world.rank == 0:
            self._thread.join()
            if self._bar:
                self._stream.write("\r\033[K")

    def _run(self) -> None:
        while not self._over.wait(0.5 if self._bar else 5.0):
            mine, *peers = [self._world.heartbeat.progress, *self._world.heartbeat.peers[1:]]
            now = sum(int(peer.get("rows", 0)) for peer in (mine, *peers))
            errors = sum(int(peer.get("errors", 0)) for peer in (mine, *peers))
            rate = now / (time.monotonic() - self._started)
            done = self._before + now
            left = hours_minutes_seconds((self._total - done) / rate) if rate else "?"
            counts = f"{done:,} of {self._total:,} rows, {rate:,.0f} images/s"
            text = f"{counts}, {left} left, {plural(errors, 'error')}"
            if self._bar:
                full = round(24 * done / max(self._total, 1))
                self._stream.write(f"\r\033[K{'█' * full}{'░' * (24 - full)} {text}")
                self._stream.flush()
            else:
                log.info("%s", text)


def print_table(summary: dict[str, Any], ranks: Sequence[RankMetrics]) -> None:
    """Print the table for people, then the JSON line for scripts, last on stdout. Rank 0 only."""
    ok, missing = (f"{summary[name]:,} {name}" for name in ("ok", "missing"))
    errors, duplicates = (plural(summary[f"{noun}s"], noun) for noun in ("error", "duplicate"))
    if summary["errors"]:
        errors += " (in errors.jsonl)"
    shape = ", ".join(str(n) for n in summary["predictions"])
    found = ", ".join(summary.get("columns", ())) or f"predictions ({shape})"
    lines = [
        f"{found}  {summary['status']}  {summary['run_dir']}",
        f"{plural(summary['samples'], 'sample')}: {ok}, {errors}, {missing}, {duplicates}",
    ]
    lines.append(f"preprocessing: {summary['transform']}")
    if summary["changed"]:
        lines.append(f"{plural(summary['changed'], 'changed image')} predicted again")
    if summary["left_out"]:
        lines.append(describe(summary["left_out"]))
    accuracy = summary["accuracy"]
    if accuracy and accuracy["compared"]:
        top5 = "" if accuracy["top5"] is None else f", top-5 {accuracy['top5']:.2%}"
        rows = plural(accuracy["compared"], "row")
        lines.append(f"top-1 {accuracy['top1']:.2%}{top5} of {rows} ({accuracy['how']})")
    lines += _all_starts(summary["all_starts"])
    if summary["weights"] == RANDOM:
        lines.append(f"WARNING: {RANDOM_WEIGHTS}")
    if ranks:
        steady, overall = summary["images_per_s"], summary["images_per_s_with_startup"]
        start = f"with {summary['startup_s']:.1f} s of start-up"
        rates = f"{overall:,.1f} images/s {start}: too short for a steady rate"
        if summary["steady"]:
            rates = f"{steady:,.1f} images/s steady, {overall:,.1f} {start}"
        lines += [
            f"{'this start: ' if summary['all_starts']['starts'] > 1 else ''}{duration(summary['wall_s'])}, {rates}",
            *_bottleneck(summary),
            *_warnings(summary),
            "",
            f"{'rank':>4}" + "".join(f"{title:>12}" for title in RANK_COLUMNS) + f"{'batch p50/p95':>18}",
        ]
        for r in ranks[:MAX_RANKS_SHOWN]:
            seconds = "".join(
                f"{value:>10.1f} s" for value in (r.wait_s, r.input_s, r.predict_s, r.peers_s, r.gather_s, r.write_s)
            )
            batch = f"{r.batch_p50_ms:.0f}/{r.batch_p95_ms:.0f} ms"
            lines.append(f"{r.rank:>4}{r.rows:>12,}{r.images_per_s:>12,.1f}{seconds}{batch:>18}")
    elif summary["status"] == "complete":
        retry = f", retry_failed=true retries the {plural(summary['errors'], 'error')}" if summary["errors"] else ""
        lines.append(f"complete already: no row was left to predict. overwrite=true starts anew{retry}.")
    print_lines(lines)
    print_summary(summary)


def _all_starts(together: dict[str, Any]) -> Iterator[str]:
    untimed = "" if together["timed"] else "; earlier ones were not timed"
    if together["starts"] > 1 or (together["starts"] and untimed):
        rate = f"{together['images_per_s']:,.1f} images/s with start-up"
        rows, starts = plural(together["rows"], "row"), plural(together["starts"], "start")
        yield f"in all: {duration(together['wall_s'])}, {rows}, {rate}, over {starts}{untimed}"


def _bottleneck(summary: dict[str, Any]) -> Iterator[str]:
    if summary["bottleneck"]:
        share = f"{summary['bottleneck_share']:.0%} of the ranks' time"
        yield f"bottleneck: {summary['bottleneck']}, {share} ({summary['remedy']})"


def _warnings(summary: dict[str, Any]) -> Iterator[str]:
    if not summary.get("bitwise", True):
        yield "rows depend on their batch: the last bits may differ at another number of ranks or after a resume"
    if summary["clipped"]:
        yield f"boxes that reached beyond their image and were clipped: {summary['clipped']:,}"
    if summary["nonfinite"]:
        yield f"WARNING: {plural(summary['nonfinite'], 'row')} with NaN or Inf in the outputs, recorded as errors"
    if summary["split_rows"]:
        yield f"WARNING: {plural(summary['split_rows'], 'row')} predicted in smaller batches, for lack of memory"


def print_summary(summary: dict[str, Any]) -> None:
    """Print one JSON line on stdout. Rank 0 only."""
    print(json.dumps(summary), flush=True)
