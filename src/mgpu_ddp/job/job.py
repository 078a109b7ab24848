"""One job, and the order by which rank 0 has the other ranks run it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mgpu_ddp.config.schema import Config, pack, unpack
from mgpu_ddp.config.script import Script


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A validated configuration with the place and the name it runs under."""

    name: str
    """Unique in this process; payloads carry it."""
    config: Config
    run_dir: Path
    batch_size_given: bool = True
    in_sweep: bool = False
    """Other jobs may come before and after it."""
    script: Script = field(default_factory=Script)
    """The script's own functions, which every rank has."""
    hydra_files: dict[str, Any] | None = None
    """The content of RUN/.hydra, by file name. On rank 0."""

    def order(self) -> dict[str, Any]:
        """Return what the other ranks need to run it, as JSON values."""
        return {
            "name": self.name,
            "config": pack(self.config),
            "run_dir": str(self.run_dir),
            "batch_size_given": self.batch_size_given,
            "in_sweep": self.in_sweep,
        }

    @classmethod
    def ordered(cls, order: dict[str, Any], script: Script) -> "Job":
        """The job that rank 0 asks for."""
        return cls(**order | {"config": unpack(order["config"]), "run_dir": Path(order["run_dir"])}, script=script)
