"""The measurements of each rank, and of all together: `metrics.json`."""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mgpu_ddp.distributed.host import peaks
from mgpu_ddp.distributed.world import World
from mgpu_ddp.inference.clock import Clock
from mgpu_ddp.output.atomic_files import replace_json
from mgpu_ddp.output.manifest import Manifest

MORE_CORES = "give the job more CPU cores, which loader.workers=auto takes"
REMEDIES = {
    "generate": MORE_CORES,
    "read": "raise loader.workers or move the images to faster storage",
    "pack": MORE_CORES,
    "decode": MORE_CORES,
    "resize": MORE_CORES,
    "gpu input": "the GPU's JPEG decoder is the limit: more GPUs, or for small images runtime.decode=cpu",
    "forward": "raise batch_size, or lower runtime.precision",
    "collect and write": "set output.collect=shards or write fewer output.fields",
    "waiting for peers": "look at the slowest rank in metrics.json",
}
FORWARD_ON_CPU = "more CPU cores, or a GPU"

MAX_BINS = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMetrics:
    """The measurements of one rank; seconds are wall time of its main thread unless said otherwise.

    Fields that are also the clock's mean the same.
    """

    rank: int
    rows: int
    errors: int
    nonfinite: int
    """Error rows for outputs that held NaN or Inf."""
    split_rows: int
    """Rows whose batch was split for lack of memory."""
    images_per_s: float
    """After the first batches, which pay for warming up."""
    steady_rows: int
    steady_s: float
    startup_s: float
    """From the start of the job to the first prediction. The process's first job begins with the process."""
    wall_s: float
    """From the start of the job to the end of the loop."""
    reused: tuple[str, ...]
    """Taken over from the job before, in a sweep: model (its weights), predictor (on its device, compiled)."""
    wait_s: float
    """Waiting for the loader."""
    input_s: float
    """Waiting for model input to be made on the GPU."""
    decode_s: float
    """Inside the GPU's JPEG decoder, in the threads that make model input."""
    predict_s: float
    gpu_busy_share: float | None
    """The share of the loop's time in which the GPU ran the model or copied its results; 1 where several batches did so
    side by side. None on the CPU."""
    peers_s: float
    """Waiting for the windows of all ranks."""
    gather_s: float
    """In the collecting thread."""
    write_s: float
    """In the collecting thread."""
    workers_s: dict[str, float]
    """Seconds of all loader workers together, by stage."""
    read_bytes: int
    """By loader workers, through the kernel."""
    clipped: int
    """Boxes that reached beyond their image."""
    host: str
    device: str
    pace: list[list[float]]
    """[seconds since the job began, rows done by then], a bounded number of points."""
    batch_p50_ms: float
    batch_p95_ms: float
    peak_host_bytes: int
    peak_gpu_bytes: int


def measure(world: World, clock: Clock) -> RankMetrics:
    """Read the clock of this rank, at the end of its job."""
    wall_s = time.perf_counter() - clock.began
    loop_s = clock.ended - clock.started
    steady_rows, steady_s = clock.steady
    on_gpu = world.device.type == "cuda"
    pace = [*clock.pace, (clock.ended - clock.began, clock.rows)] if clock.rows else []
    batch_ms = np.array(clock.batch_s[1:] or clock.batch_s or [0.0]) * 1e3
    same = {field.name for field in fields(RankMetrics)} & {field.name for field in fields(Clock)}
    derived: dict[str, Any] = {
        "rank": world.rank,
        "images_per_s": steady_rows / steady_s if steady_s else 0.0,
        "steady_rows": steady_rows,
        "steady_s": steady_s,
        "startup_s": clock.first_at - clock.began if clock.rows else wall_s,
        "wall_s": wall_s,
        "gpu_busy_share": min(1.0, clock.gpu_s / loop_s) if on_gpu and clock.rows else None,
        "host": os.uname().nodename,
        "device": torch.cuda.get_device_name(world.device) if on_gpu else "cpu",
        "pace": [[round(at_s, 3), rows] for at_s, rows in pace],
        "batch_p50_ms": float(np.percentile(batch_ms, 50)),
        "batch_p95_ms": float(np.percentile(batch_ms, 95)),
    }
    return RankMetrics(**{name: getattr(clock, name) for name in same} | derived | peaks())


def bottleneck(ranks: Sequence[RankMetrics]) -> tuple[str, float] | None:
    """Find the stage that the ranks waited for longest, and its share of all their waiting.

    None where nothing was done, or nothing waited for.
    """
    waits = {
        "loading": sum(r.wait_s for r in ranks),
        "gpu input": sum(r.input_s for r in ranks),
        "forward": sum(r.predict_s for r in ranks),
        "collect and write": sum(r.peers_s for r in ranks),
    }
    worst = max(waits, key=lambda stage: waits[stage])
    if not waits[worst] or not any(r.rows for r in ranks):
        return None
    share = waits[worst] / sum(waits.values())
    if worst == "loading":
        stages: dict[str, float] = {}
        for rank in ranks:
            for stage, seconds in rank.workers_s.items():
                stages[stage] = stages.get(stage, 0.0) + seconds
        return max(stages, key=lambda stage: stages[stage], default="read"), share
    if worst == "collect and write" and sum(r.write_s for r in ranks) < waits[worst] / 2:
        return "waiting for peers", share
    return worst, share


def throughput(ranks: Sequence[RankMetrics]) -> dict[str, Any]:
    """Sum the rows of all ranks over at most `MAX_BINS` equal stretches of time, from each rank's first batch on."""
    paces = [np.array(r.pace) for r in ranks if r.pace]
    begin = min((pace[0, 0] for pace in paces), default=0.0)
    end = max((pace[-1, 0] for pace in paces), default=0.0)
    if end <= begin:
        return {"from_s": round(begin, 3), "bin_s": 0.0, "rows": []}
    bins = max(1, min(MAX_BINS, min(len(pace) for pace in paces) // 3))
    edges = np.linspace(begin, end, bins + 1)
    done = sum(np.interp(edges, pace[:, 0], pace[:, 1]) for pace in paces)
    return {
        "from_s": round(begin, 3),
        "bin_s": round((end - begin) / bins, 3),
        "rows": np.diff(done).round(1).tolist(),
    }


def all_starts(manifest: Manifest) -> dict[str, Any]:
    """Rows, time and rate of all starts of a job together.

    `timed` is false where an older version, which kept no times, committed some of the rows.
    """
    rows = sum(start.rows for start in manifest.starts)
    wall_s = round(sum(start.wall_s for start in manifest.starts), 3)
    return {
        "starts": len(manifest.starts),
        "rows": rows,
        "wall_s": wall_s,
        "images_per_s": rows / wall_s if wall_s else 0.0,
        "timed": rows >= manifest.prefix - manifest.start,
    }


def write_metrics(
    run_dir: Path,
    ranks: Sequence[RankMetrics],
    *,
    rows: int,
    deterministic: bool,
    of_job: dict[str, Any],
) -> dict[str, Any]:
    """Write `metrics.json` and return its figures of this start, all ranks together. Rank 0 only."""
    wall_s = max(r.wall_s for r in ranks)
    steady_s = max(r.steady_s for r in ranks)
    remedies = REMEDIES
    if ranks[0].device == "cpu":
        remedies = REMEDIES | {"forward": FORWARD_ON_CPU}
    stage, share = bottleneck(ranks) or (None, None)
    together: dict[str, Any] = {
        "images_per_s": sum(r.steady_rows for r in ranks) / steady_s if steady_s else 0.0,
        "images_per_s_with_startup": rows / wall_s,
        "wall_s": wall_s,
        "steady_s": steady_s,
        # Of a few batches alone the time is that of starting up.
        "steady": any(r.steady_rows < r.rows for r in ranks),
        "startup_s": max(r.startup_s for r in ranks),
        "reused": list(ranks[0].reused),
        "rows_this_run": rows,
        "nonfinite": sum(r.nonfinite for r in ranks),
        "split_rows": sum(r.split_rows for r in ranks),
        "clipped": sum(r.clipped for r in ranks),
        "read_bytes": sum(r.read_bytes for r in ranks),
        "deterministic": deterministic,
        "peak_gpu_bytes": max(r.peak_gpu_bytes for r in ranks),
        "peak_host_bytes": max(r.peak_host_bytes for r in ranks),
        "bottleneck": stage,
        "bottleneck_share": share,
        "remedy": remedies[stage] if stage else None,
    }
    each = [{name: value for name, value in asdict(r).items() if name != "pace"} for r in ranks]
    replace_json(run_dir / "metrics.json", {**together, **of_job, "throughput": throughput(ranks), "ranks": each})
    return together
