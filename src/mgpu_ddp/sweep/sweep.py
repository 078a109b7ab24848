"""A sweep's answer: a row for each of its jobs, on disk as soon as it is known, then a table and a picture."""

import csv
import io
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from mgpu_ddp.config.schema import GROUPS
from mgpu_ddp.errors import Exit, UsageError, reason_of
from mgpu_ddp.job.autotune import GAIN
from mgpu_ddp.output.atomic_files import replace_bytes, replace_json
from mgpu_ddp.sweep.page import write_sweep_page
from mgpu_ddp.sweep.results import LEDGER, PICTURE, memory_of, points_of

log = logging.getLogger("mgpu_ddp")

WORK = ("data", "model", "transform", "limit", "shard")
"""Keys that change what there is to do: their rates are no choice between ways to do it."""
SHORT_S = 1.0
"""A rate measured for less says little."""
MEASURED = (
    *("images_per_s", "images_per_s_with_startup", "startup_s", "reused", "wall_s", "peak_gpu_bytes"),
    *("peak_host_bytes", "bottleneck", "samples", "errors", "world_size", "device", "steady_s"),
)
"""What a row takes from the summary of its job."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One job of a sweep: where in it, and what is particular to it."""

    job: int
    repeat: int
    values: dict[str, Any]
    """Swept keys and their values."""
    overrides: list[str]
    """All that was asked for, but for what only the sweep as a whole reads."""


def point_of(cfg: DictConfig, swept: Sequence[str]) -> Point:
    """The point that Hydra has composed."""
    composed = HydraConfig.get()
    choices = composed.runtime.choices
    overrides = [word for word in composed.overrides.task if not word.lstrip("+").startswith("sweep")]
    return Point(
        job=int(composed.job.num),
        repeat=int(cfg.sweep.repeat),
        values={key: choices[key] if key in GROUPS else OmegaConf.select(cfg, key) for key in swept},
        overrides=overrides,
    )


class Sweep:
    """The rows of a sweep folder. Rank 0 only."""

    def __init__(self, folder: Path, swept: Sequence[str], *, stop_on_oom: bool) -> None:
        self.folder, self.swept = folder, list(swept)
        self._stop_on_oom = stop_on_oom
        self._over = False
        """Whether nothing more can run: a rank was lost, or a signal asked to stop."""
        self._status = "running"
        self._rows: dict[int, dict[str, Any]] = {}
        try:
            self._rows = {row["job"]: row for row in json.loads((folder / LEDGER).read_text())["jobs"]}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(
                f"{folder / LEDGER} must be the ledger of a sweep, got {type(error).__name__}. Choose another"
                " hydra.sweep.dir."
            ) from None

    def run(self, point: Point, run: Callable[[], dict[str, Any]]) -> float:
        """Run a point, unless its answer is known, and keep the answer. Returns images/s, 0 where it failed.

        Once `run` has raised, or was preempted, no other point runs.

        Raises:
            UsageError: the folder holds another sweep.
        """
        if self._over:
            return 0.0
        self._over = True
        row = self._known(point)
        if row is None:
            named = ", ".join(f"{key}={value}" for key, value in point.values.items())
            log.info("job %d, round %d: %s", point.job, point.repeat, named)
            try:
                outcome = run()
            except Exception as error:
                self._keep(point, {"status": "failed", "reason": reason_of(error)})
                raise
            row = self._keep(point, outcome)
        else:
            log.info("job %d is %s already", point.job, row["status"])
            self._rows[point.job] = row
            self._write()
        self._over = row["status"] == "preempted"
        return float(row.get("images_per_s", 0.0))

    def _keep(self, point: Point, outcome: dict[str, Any]) -> dict[str, Any]:
        found = {name: outcome[name] for name in MEASURED if name in outcome}
        rest = {name: outcome.get(name) for name in ("status", "reason", "run_dir")}
        # What was asked for may be auto, or more than there are samples.
        rest["used_batch_size"] = outcome.get("batch_size")
        self._rows[point.job] = {**asdict(point), **rest, **found}
        self._write()
        return self._rows[point.job]

    def _known(self, point: Point) -> dict[str, Any] | None:
        before = self._rows.get(point.job)
        if before is not None and (before["overrides"], before["repeat"]) != (point.overrides, point.repeat):
            asked = [*before["overrides"], f"round {before['repeat']}"], [*point.overrides, f"round {point.repeat}"]
            # All of them where only their order differs.
            then, now = (
                " ".join([word for word in ours if word not in theirs] or ours) for ours, theirs in (asked, asked[::-1])
            )
            raise UsageError(
                f"hydra.sweep.dir must be new or hold this same sweep, got {str(self.folder)!r}, whose job {point.job}"
                f" had {then!r} where this one has {now!r}. Choose another."
            )
        if before is not None and before["status"] == "complete":
            return before
        batch_size = point.values.get("batch_size")
        if self._stop_on_oom and isinstance(batch_size, int):
            others = {**point.values, "batch_size": None}
            for row in self._rows.values():
                alike = {**row["values"], "batch_size": None} == others
                if row["status"] == "oom" and alike and row["values"]["batch_size"] <= batch_size:
                    reason = f"batch_size={row['values']['batch_size']} ran out of memory"
                    return {**asdict(point), "status": "skipped", "reason": reason, "run_dir": None}
        return None

    def _write(self) -> None:
        rows = [self._rows[job] for job in sorted(self._rows)]
        replace_json(self.folder / LEDGER, {"status": self._status, "swept": self.swept, **self.answer(), "jobs": rows})

    @property
    def points(self) -> list[dict[str, Any]]:
        """The points in order, each with what its repeats have in common."""
        return points_of([self._rows[job] for job in sorted(self._rows)])

    def answer(self) -> dict[str, Any]:
        """The recommended point: of those within 3 % of the best rate the one of the smallest batch.

        Where the work itself is swept, there is one for each kind of work, in a list.
        """
        chosen = [values for work in self._by_work() if (values := self._recommend(work)) is not None]
        best = max((point["images_per_s"] for point in self.points if point["images_per_s"]), default=0.0)
        recommended = chosen if any(_is_work(key) for key in self.swept) else next(iter(chosen), None)
        return {"recommended": recommended, "best_images_per_s": best}

    def _by_work(self) -> list[list[dict[str, Any]]]:
        groups: dict[str, list[dict[str, Any]]] = {}
        for point in self.points:
            work = json.dumps({key: value for key, value in point["values"].items() if _is_work(key)})
            groups.setdefault(work, []).append(point)
        return list(groups.values())

    def _recommend(self, points: list[dict[str, Any]]) -> dict[str, Any] | None:
        good = [point for point in points if point["images_per_s"]]
        best = max((point["images_per_s"] for point in good), default=0.0)
        near = [point for point in good if point["images_per_s"] * GAIN >= best]
        if "batch_size" not in self.swept:
            near = [point for point in near if point["images_per_s"] == best]
        if not near or (self.swept and all(_is_work(key) for key in self.swept)):
            return None
        values: dict[str, Any] = min(near, key=lambda point: _as_number(point["used_batch_size"]))["values"]
        return values

    def conclude(self, code: int) -> dict[str, Any]:
        """Write `sweep.csv`, `sweep.png` and `report.html`, print the table, return what the last line says of all.

        `code` is what the process is going to return.
        """
        answer, points = self.answer(), self.points
        self._status = {int(Exit.COMPLETE): "complete", int(Exit.PREEMPTED): "preempted"}.get(code, "failed")
        self._write()
        text = io.StringIO()
        columns = ["job", "repeat", *self.swept, "status", "reason", *MEASURED, "used_batch_size", "run_dir"]
        table = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        for job in sorted(self._rows):
            row = self._rows[job]
            table.writerow(row | row["values"] | {"reused": " ".join(row.get("reused", ()))})
        replace_bytes(self.folder / "sweep.csv", text.getvalue().encode())
        chosen = answer["recommended"] if isinstance(answer["recommended"], list) else [answer["recommended"]]
        print("\n".join(_table(points, self.swept, chosen)), flush=True)
        if points:
            self._draw(points, chosen)
        statuses = [row["status"] for row in self._rows.values()]
        counts = {"jobs": len(statuses)} | {name: statuses.count(name) for name in ("failed", "oom", "skipped")}
        return {"status": self._status, "exit_code": code, **counts, **answer, "sweep_dir": str(self.folder)}

    def _draw(self, points: list[dict[str, Any]], chosen: list[dict[str, Any]]) -> None:
        try:
            # matplotlib is slow to import.
            from mgpu_ddp.sweep.plot import draw

            draw(points, self.swept, chosen, self.folder / PICTURE)
        except Exception as error:  # the numbers are there: a picture that cannot be drawn takes none of them away
            log.warning("sweep.png could not be drawn: %s", reason_of(error))
        try:
            write_sweep_page(self.folder)
        except Exception as error:
            log.warning("the sweep's report.html could not be made: %s", reason_of(error))


def _is_work(key: str) -> bool:
    return key.partition(".")[0] in WORK


def _as_number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("inf")


def _table(points: list[dict[str, Any]], swept: list[str], chosen: list[dict[str, Any]]) -> list[str]:
    kind, words = memory_of(points)
    heads = [*swept, "images/s", "from", "to", f"peak {words}", "start-up", ""]
    lines = []
    for point in points:
        cells = [str(point["values"][key]) for key in swept]
        memory = f"{point[kind] / 2**30:.2f} GiB" if point[kind] else ""
        if point["images_per_s"] is None:
            name = "OOM" if point["status"] == "oom" else point["status"]
            lines.append([*cells, name, "", "", memory, "", point["reason"] or ""])
            continue
        spread = [f"{point[name]:,.1f}" if point["repeats"] > 1 else "" for name in ("slowest", "fastest")]
        mark = "<- recommended" if point["values"] in chosen else ""
        if point["values"].get("batch_size", used := point["used_batch_size"]) != used:
            mark = f"with {used} {mark}".rstrip()
        rate = f"{point['images_per_s']:,.1f}"
        lines.append([*cells, rate, *spread, memory, f"{point['startup_s']:.1f} s", mark])
    # The last column, of reasons, is not padded.
    widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads) - 1)]
    table = [
        "  ".join([*(cell.rjust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in [heads, *lines]
    ]
    short = min((point["steady_s"] for point in points if point["images_per_s"]), default=SHORT_S)
    if short < SHORT_S:
        table.append(f"measured for {short:.2f} s at the least: more samples would make the rates comparable")
    return table
