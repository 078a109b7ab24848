"""The manifest: the job's identity and the parts that are done."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mgpu_ddp.errors import UsageError
from mgpu_ddp.output.atomic_files import replace_json

MANIFEST = "manifest.json"
PARTS = "predictions"
ARRAY = "predictions.npy"


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A durable stretch [first, first + rows) of the dataset, as the manifest lists it."""

    file: str
    """Relative to the run folder."""
    first: int
    rows: int
    errors: int
    num_bytes: int
    sha256: str
    split_rows: int = 0
    """Rows whose batch was split for lack of memory: their last bits may differ."""
    reasons: dict[str, str] = field(default_factory=dict)
    """index → reason, for a format that has no place for reasons."""

    @property
    def stop(self) -> int:
        return self.first + self.rows

    def has_its_size(self, run_dir: Path) -> bool:
        """Compare the length of the file with that at its commit; False where it is gone."""
        path = run_dir / self.file
        try:
            if self.file == ARRAY:
                # numpy compares the header with the length of the file.
                np.load(path, mmap_mode="r")
                return True
            return path.stat().st_size == self.num_bytes
        except (OSError, ValueError, EOFError):
            return False


@dataclass(kw_only=True, slots=True)
class Manifest:
    """The job's identity and the parts that are done."""

    fingerprint: dict[str, Any]
    """The keys that decide the rows, resolved: another value is another job."""
    start: int
    stop: int
    batch_size: int
    parts: list[Part] = field(default_factory=list)
    world_sizes: list[int] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    complete: bool = False
    slurm_job: str = ""
    """The SLURM job that began it, where one did."""
    shard: str | None = None
    """i/n, where it is one of n independent jobs."""

    @property
    def prefix(self) -> int:
        """The first index that is not committed."""
        return self.parts[-1].stop if self.parts else self.start

    @property
    def errors(self) -> int:
        return sum(part.errors for part in self.parts)

    @property
    def output_format(self) -> str:
        """`output.format` of the job."""
        return str(self.fingerprint["output.format"])

    @classmethod
    def read(cls, run_dir: Path) -> "Manifest | None":
        """The manifest of a folder, None where there is none.

        Raises:
            UsageError: the file is not a manifest of ours.
        """
        path = run_dir / MANIFEST
        try:
            raw = json.loads(path.read_text())
            return cls(**{**raw, "parts": [Part(**part) for part in raw["parts"]]})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(
                f"{path} is not a manifest that can be read ({type(error).__name__}). Choose another output.dir."
            ) from None

    def write(self, run_dir: Path) -> None:
        replace_json(run_dir / MANIFEST, asdict(self))


def write_status(run_dir: Path, status: str, manifest: Manifest, reason: str | None = None) -> None:
    """Write `status.json`: running, complete, failed or preempted, with counts. Rank 0 only."""
    total, rows = manifest.stop - manifest.start, manifest.prefix - manifest.start
    counts = {"total": total, "ok": rows - manifest.errors, "error": manifest.errors, "missing": total - rows}
    replace_json(run_dir / "status.json", {"status": status, "reason": reason, "counts": counts})
