"""A sweep: a row for each of its jobs, on disk as soon as it is known, then a table, a plot and a page."""

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
from mgpu_ddp.output.regular_files import read_json
from mgpu_ddp.reporting.page import PAGE
from mgpu_ddp.reporting.terminal import print_lines
from mgpu_ddp.reporting.text import gibibytes
from mgpu_ddp.sweep.page import write_sweep_page
from mgpu_ddp.sweep.results import PLOT_FILE, SWEEP_FILE, as_list, merge_repeats, named, peak_memory

log = logging.getLogger("mgpu_ddp")

WORK = ("data", "model", "transform", "limit", "shard")
"""Keys that change what there is to do: their rates are no choice between ways to do it."""
CSV_FILE = "sweep.csv"
SHORT_S = 1.0
"""A rate measured for less says little."""
MEASURED = (
    *("images_per_s", "images_per_s_with_startup", "startup_s", "reused", "wall_s", "peak_gpu_bytes"),
    *("peak_host_bytes", "bottleneck", "samples", "errors", "world_size", "device", "steady_s"),
)
"""Keys that a row takes from the summary of its job."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One job of a sweep: its place, and the values that are its own."""

    job: int
    repeat: int
    values: dict[str, Any]
    """Swept keys and their values."""
    overrides: list[str]
    """The words of the command line, without those that only the sweep as a whole reads."""


def point_of(cfg: DictConfig, swept: Sequence[str]) -> Point:
    """The point that Hydra has composed."""
    composed = HydraConfig.get()
    choices = composed.runtime.choices
    overrides = [word for word in composed.overrides.task if not word.lstrip("+").startswith("sweep")]
    return Point(
        job=int(composed.job.num),
        repeat=int(cfg.sweep.repeat),
        values={key: choices[key] if key in GROUPS else _plain(OmegaConf.select(cfg, key)) for key in swept},
        overrides=overrides,
    )


def _plain(value: Any) -> Any:
    """A value that JSON, a plot's axis and a table can hold: a list as text."""
    return str(value) if OmegaConf.is_config(value) else value


class Sweep:
    """The rows of a sweep folder. Rank 0 only."""

    def __init__(self, folder: Path, swept: Sequence[str], *, stop_on_oom: bool) -> None:
        self.folder, self.swept = folder, list(swept)
        self._stop_on_oom = stop_on_oom
        self._over = False
        """Nothing more can run: a rank was lost, or a signal asked to stop."""
        self._status = "running"
        self._rows: dict[int, dict[str, Any]] = {}
        try:
            self._rows = {row["job"]: row for row in read_json(folder / SWEEP_FILE)["jobs"]}
        except FileNotFoundError:
            foreign = [name for name in (CSV_FILE, PLOT_FILE, PAGE) if (folder / name).is_file()]
            if foreign:
                raise UsageError(
                    f"hydra.sweep.dir must be new or hold a sweep, got {str(folder)!r} with a foreign {foreign[0]}."
                    " Choose another."
                ) from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(
                f"{folder / SWEEP_FILE} is not the file of a sweep ({type(error).__name__}). Choose another"
                " hydra.sweep.dir."
            ) from None

    @property
    def points(self) -> list[dict[str, Any]]:
        """The points in order, the repeats of each merged into one row."""
        return merge_repeats(self._ordered())

    def run(self, point: Point, run: Callable[[], dict[str, Any]]) -> float:
        """Run a point, unless its outcome is known, and keep the outcome. Returns images/s, 0 where it failed.

        Once `run` has raised, or was preempted, no other point runs.

        Raises:
            UsageError: the folder holds another sweep.
        """
        if self._over:
            return 0.0
        self._over = True
        self._check_same(point)
        row = self._completed(point) or self._skipped(point)
        if row is not None:
            log.info("job %d is %s", point.job, "skipped" if row["status"] == "skipped" else "complete already")
        else:
            log.info("job %d, round %d: %s", point.job, point.repeat, named(point.values))
            try:
                row = _row_of(point, run())
            except Exception as error:
                self._keep(point, _row_of(point, {"status": "failed", "reason": reason_of(error)}))
                raise
        self._keep(point, row)
        self._over = row["status"] == "preempted"
        return float(row.get("images_per_s", 0.0))

    def answer(self) -> dict[str, Any]:
        """The recommended point: of those within 3 % of the best rate the one with the smallest batch.

        Where the work itself is swept, there is one for each kind of work, in a list.
        """
        chosen = [values for work in self._by_work() if (values := self._recommend(work)) is not None]
        best = max((point["images_per_s"] for point in self.points if point["images_per_s"]), default=0.0)
        recommended = chosen if any(_is_work(key) for key in self.swept) else next(iter(chosen), None)
        return {"recommended": recommended, "best_images_per_s": best}

    def conclude(self, code: int) -> dict[str, Any]:
        """Write `sweep.csv`, `sweep.png` and `report.html`, print the table, and return the summary of the sweep.

        `code` is the exit code of the process.
        """
        answer, points = self.answer(), self.points
        chosen = as_list(answer["recommended"])
        self._status = {int(Exit.COMPLETE): "complete", int(Exit.PREEMPTED): "preempted"}.get(code, "failed")
        self._write()
        self._write_csv()
        print_lines(_table(points, self.swept, chosen))
        if points:
            self._try(PLOT_FILE, lambda: self._draw(points, chosen))
            self._try(PAGE, lambda: write_sweep_page(self.folder))
        statuses = [row["status"] for row in self._rows.values()]
        counts = {"jobs": len(statuses)} | {name: statuses.count(name) for name in ("failed", "oom", "skipped")}
        return {"status": self._status, "exit_code": code, **counts, **answer, "sweep_dir": str(self.folder)}

    def _ordered(self) -> list[dict[str, Any]]:
        return [self._rows[job] for job in sorted(self._rows)]

    def _keep(self, point: Point, row: dict[str, Any]) -> None:
        self._rows[point.job] = row
        self._write()

    def _write(self) -> None:
        head = {"status": self._status, "swept": self.swept, **self.answer()}
        replace_json(self.folder / SWEEP_FILE, {**head, "jobs": self._ordered()})

    def _check_same(self, point: Point) -> None:
        """Raise a UsageError if the folder has another job in the place of this one."""
        before = self._rows.get(point.job)
        if before is None or (before["overrides"], before["repeat"]) == (point.overrides, point.repeat):
            return
        then = [*before["overrides"], f"round {before['repeat']}"]
        now = [*point.overrides, f"round {point.repeat}"]
        # All of them where only their order differs.
        only_then = " ".join([word for word in then if word not in now] or then)
        only_now = " ".join([word for word in now if word not in then] or now)
        raise UsageError(
            f"hydra.sweep.dir must be new or hold this same sweep, got {str(self.folder)!r}, whose job {point.job}"
            f" had {only_then!r} where this one has {only_now!r}. Choose another."
        )

    def _completed(self, point: Point) -> dict[str, Any] | None:
        """The row of a point that an earlier start of the sweep has completed."""
        before = self._rows.get(point.job)
        return before if before is not None and before["status"] == "complete" else None

    def _skipped(self, point: Point) -> dict[str, Any] | None:
        """The row of a point to skip: a batch no larger, with the same other values, ran out of memory."""
        batch_size = point.values.get("batch_size")
        if not self._stop_on_oom or not isinstance(batch_size, int):
            return None
        others = {**point.values, "batch_size": None}
        for row in self._rows.values():
            alike = {**row["values"], "batch_size": None} == others
            if row["status"] == "oom" and alike and row["values"]["batch_size"] <= batch_size:
                reason = f"batch_size={row['values']['batch_size']} ran out of memory"
                return {**asdict(point), "status": "skipped", "reason": reason, "run_dir": None}
        return None

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

    def _write_csv(self) -> None:
        text = io.StringIO()
        columns = ["job", "repeat", *self.swept, "status", "reason", *MEASURED, "used_batch_size", "run_dir"]
        table = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        for row in self._ordered():
            table.writerow(row | row["values"] | {"reused": " ".join(row.get("reused", ()))})
        replace_bytes(self.folder / CSV_FILE, text.getvalue().encode())

    def _draw(self, points: list[dict[str, Any]], chosen: list[dict[str, Any]]) -> None:
        # matplotlib is slow to import.
        from mgpu_ddp.sweep.plot import draw

        draw(points, self.swept, chosen, self.folder / PLOT_FILE)

    def _try(self, name: str, write: Callable[[], object]) -> None:
        """Write a file, or log why not: the numbers are on disk, and a picture of them that fails ends no sweep."""
        try:
            write()
        except Exception as error:
            log.warning("%s was not written: %s", self.folder / name, reason_of(error))


def _row_of(point: Point, outcome: dict[str, Any]) -> dict[str, Any]:
    row = {**asdict(point), **{name: outcome.get(name) for name in ("status", "reason", "run_dir")}}
    # The batch size that was asked for may be auto, or more than there are samples.
    row["used_batch_size"] = outcome.get("batch_size")
    return row | {name: outcome[name] for name in MEASURED if name in outcome}


def _is_work(key: str) -> bool:
    return key.partition(".")[0] in WORK


def _as_number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("inf")


def _table(points: list[dict[str, Any]], swept: list[str], chosen: list[dict[str, Any]]) -> list[str]:
    """The lines of the table for people."""
    peak, memory = peak_memory(points)
    heads = [*swept, "images/s", "from", "to", f"peak {memory}", "start-up", ""]
    lines = [heads, *(_cells(point, swept, peak, chosen) for point in points)]
    # The last column, of reasons, is not padded.
    widths = [max(map(len, column)) for column in list(zip(*lines, strict=True))[:-1]]
    table = [
        "  ".join([*(cell.rjust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in lines
    ]
    shortest = min((point["steady_s"] for point in points if point["images_per_s"]), default=SHORT_S)
    if shortest < SHORT_S:
        table.append(f"the shortest measurement took {shortest:.2f} s: more samples would make the rates comparable")
    return table


def _cells(point: dict[str, Any], swept: list[str], peak: str, chosen: list[dict[str, Any]]) -> list[str]:
    values = [str(point["values"][key]) for key in swept]
    memory = gibibytes(point[peak], 2) if point[peak] else ""
    if point["images_per_s"] is None:
        status = "OOM" if point["status"] == "oom" else point["status"]
        return [*values, status, "", "", memory, "", point["reason"] or ""]
    spread = [f"{point[name]:,.1f}" if point["repeats"] > 1 else "" for name in ("slowest", "fastest")]
    note = "<- recommended" if point["values"] in chosen else ""
    if point["values"].get("batch_size", used := point["used_batch_size"]) != used:
        note = f"with {used} {note}".rstrip()
    return [*values, f"{point['images_per_s']:,.1f}", *spread, memory, f"{point['startup_s']:.1f} s", note]
