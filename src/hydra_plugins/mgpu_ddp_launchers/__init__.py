"""`hydra/launcher=torchrun` and `hydra/launcher=slurm`: each job of a sweep in processes of its own.

Hydra finds this package by its place and imports it at every start, so nothing costly belongs here:
`mgpu_ddp.sweep.isolated` starts the processes.
"""

from dataclasses import dataclass
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore


@dataclass
class TorchrunConfig:
    _target_: str = "hydra_plugins.mgpu_ddp_launchers.IsolatedLauncher"
    kind: str = "torchrun"
    nproc_per_node: int | str = "auto"
    """Processes of each job. auto: one per GPU, one where there is none."""
    max_restarts: int = 0
    """How often torchrun restarts a job that crashed."""


@dataclass
class SlurmConfig:
    """Options of srun, which gets an allocation for each job and waits for it; null leaves one out."""

    _target_: str = "hydra_plugins.mgpu_ddp_launchers.IsolatedLauncher"
    kind: str = "slurm"
    nodes: int = 1
    ntasks_per_node: int = 1
    gpus_per_node: str | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None


class IsolatedLauncher(BasicLauncher):
    """Hydra's own launcher, which keeps the settings of the processes that each job starts."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings


for _config in (TorchrunConfig, SlurmConfig):
    ConfigStore.instance().store(group="hydra/launcher", name=_config.kind, node=_config, provider="mgpu_ddp")
