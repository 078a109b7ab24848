"""One job, and the order by which rank 0 has the other ranks run it."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mgpu_ddp.config.schema import Config, pack, unpack
from mgpu_ddp.config.script import Script
from mgpu_ddp.distributed.command import StartCommand
from mgpu_ddp.job.next_command import next_words, shell_line


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
    start: StartCommand | None = None
    sweep_dir: str | None = None
    """The folder of the sweep that it belongs to."""
    script: Script = field(default_factory=Script)
    """The script's own functions, which every rank has."""
    hydra_files: dict[str, Any] | None = None
    """The content of RUN/.hydra, by file name. On rank 0."""

    def next_command(self, words: tuple[str, ...] = ()) -> str | None:
        """The line for a shell that continues the job, or its sweep, with further overrides."""
        if self.start is None:
            return None
        folder = self.run_dir if self.sweep_dir is None else Path(self.sweep_dir)
        return shell_line(self.start, next_words(self.start, folder, sweep=self.sweep_dir is not None, words=words))

    def typed_command(self, words: tuple[str, ...] = ()) -> str | None:
        """The line for a shell that starts the job as it was started, with further overrides."""
        return None if self.start is None else shell_line(self.start, [*self.start.words, *words])

    def order(self) -> dict[str, Any]:
        """Return what the other ranks need to run it, as JSON values."""
        return {
            "name": self.name,
            "config": pack(self.config),
            "run_dir": str(self.run_dir),
            "batch_size_given": self.batch_size_given,
            "in_sweep": self.in_sweep,
            "start": None if self.start is None else asdict(self.start),
            "sweep_dir": self.sweep_dir,
        }

    @classmethod
    def ordered(cls, order: dict[str, Any], script: Script) -> "Job":
        """The job that rank 0 asks for."""
        start = None if order["start"] is None else StartCommand(**order["start"])
        read = {"config": unpack(order["config"]), "run_dir": Path(order["run_dir"]), "start": start}
        return cls(**order | read, script=script)
