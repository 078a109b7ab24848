"""`mgpu_ddp.open`: a run folder as an object, with its summary, its rows and its errors."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mgpu_ddp.config.checks import require
from mgpu_ddp.data.listing import FILE_NAME, Listing, no_names, readable
from mgpu_ddp.errors import StateError, UsageError, plural
from mgpu_ddp.output.columns import ColumnType
from mgpu_ddp.output.formats import FORMATS, empty_table, to_table
from mgpu_ddp.output.manifest import ARRAY, MANIFEST, Manifest
from mgpu_ddp.output.regular_files import map_array, read_object
from mgpu_ddp.output.rows import Rows
from mgpu_ddp.output.verify import error_rows

OF_MANY = ("accuracy_per_class", "throughput", "ranks")
"""Values of `metrics.json` that are too long for a summary."""


def open(folder: str | os.PathLike[str]) -> "Run":  # noqa: A001
    """Open the run folder of a job, whether it is complete, running, or ended early.

    Raises:
        UsageError: it is none.
    """
    run = Run(folder=Path(folder).absolute())
    run.read_manifest()
    return run


@dataclass(frozen=True, kw_only=True, repr=False)
class Run:
    """A run folder. What it returns is what is committed at that moment: a job may be at work in it."""

    folder: Path

    def read_manifest(self) -> Manifest:
        """The manifest as it is now.

        Raises:
            UsageError: there is none, or it is of a version that did not list columns.
        """
        manifest = Manifest.read(self.folder)
        rule = f"a run folder, which has a {MANIFEST}"
        require(manifest is not None, "folder", rule, str(self.folder), "Give the output.dir of a job.")
        assert manifest is not None
        rule = f"a run folder whose {MANIFEST} names its columns"
        require(bool(manifest.columns), "folder", rule, str(self.folder), "Start its job again, which adds them.")
        return manifest

    @property
    def summary(self) -> dict[str, Any]:
        """Status, counts and rates, by the names that the job's own JSON line has."""
        manifest = self.read_manifest()
        status, metrics = self._status_and_metrics()
        samples, rows = manifest.stop - manifest.start, manifest.prefix - manifest.start
        return {
            "status": status.get("status"),
            "reason": status.get("reason"),
            "samples": samples,
            "rows": rows,
            "ok": rows - manifest.errors,
            "errors": manifest.errors,
            "missing": samples - rows,
            "duplicates": 0,  # parts are only listed where the one before ends
            "left_out": manifest.left_out,
            "predictions": [rows, *manifest.row_shape],
            "weights": manifest.weights,
            "world_size": manifest.world_sizes[-1] if manifest.world_sizes else None,
            "batch_size": manifest.batch_size,
            "device": manifest.fingerprint.get("runtime.device"),
            "precision": manifest.fingerprint.get("runtime.precision"),
            "run_dir": str(self.folder),
            "next": status.get("next"),
            **{name: value for name, value in metrics.items() if name not in OF_MANY},
        }

    def table(self) -> Any:
        """All rows in order, as a pyarrow Table. Of `output.format=npy` its column is mapped, not read.

        Raises:
            StateError: a part is not there as it was committed.
        """
        import pyarrow as pa

        manifest = self.read_manifest()
        for part in manifest.parts:
            if not part.has_its_size(self.folder):
                raise StateError(f"{self.folder / part.file} is not as it was committed. Start the job again.")
        if manifest.output_format == "npy":
            return self._table_of_array(manifest)
        empty = empty_table([ColumnType.read(values) for values in manifest.columns])
        how = FORMATS[manifest.output_format]
        return pa.concat_tables([empty, *(how.read(self.folder / part.file, empty.schema) for part in manifest.parts)])

    def _table_of_array(self, manifest: Manifest) -> Any:
        index = np.arange(manifest.start, manifest.prefix)
        listing = self._listing()
        labels = np.full(len(index), -1, np.int32)
        if listing is not None:
            labels = listing.table["label"].slice(manifest.start, len(index)).fill_null(-1).to_numpy()
        rows = Rows(
            index=index,
            label=labels,
            columns={manifest.columns[-1]["name"]: map_array(self.folder / ARRAY)[: len(index)]},
            errors={int(i): reason for part in manifest.parts for i, reason in part.reasons.items()},
        )
        return to_table(rows, no_names(len(index)) if listing is None else listing.names(index), None)

    def to_pandas(self) -> Any:
        """All rows in order, as a pandas DataFrame.

        Raises:
            UsageError: pandas is not installed.
        """
        try:
            return self.table().to_pandas()
        except ModuleNotFoundError:
            raise UsageError("to_pandas needs the package pandas. Install it: pip install pandas.") from None

    def errors(self) -> list[dict[str, Any]]:
        """The rows of `errors.jsonl`: index, path and reason of each sample that could not be predicted."""
        listing = self._listing()

        def path_of(index: int) -> str | None:
            return None if listing is None else readable(listing.path(index))

        found = error_rows(self.folder, self.read_manifest(), path_of)
        return [{"index": index, "path": path, "reason": reason} for index, path, reason in found]

    def _listing(self) -> Listing | None:
        path = self.folder / FILE_NAME
        return Listing.open(path) if path.exists() else None

    def _status_and_metrics(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return read_object(self.folder / "status.json"), read_object(self.folder / "metrics.json")

    def __repr__(self) -> str:
        summary = self.summary
        return (
            f"<Run {str(self.folder)!r}: {summary['status']}, {summary['rows']:,} of {summary['samples']:,} rows,"
            f" {plural(summary['errors'], 'error')}>"
        )

    def _repr_html_(self) -> str:
        """The face that a notebook shows."""
        from mgpu_ddp.reporting import page_sections
        from mgpu_ddp.reporting.render import render

        status, metrics = self._status_and_metrics()
        accuracy = metrics.get("accuracy")
        return render(
            "run.html",
            summary=page_sections.summary(self.read_manifest(), accuracy, status, metrics, self.folder),
        )
