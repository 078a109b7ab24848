"""`hydra/launcher=torchrun`: each job of a sweep under a torchrun of its own.

Hydra finds this package by its place. It imports it at every start, so nothing costly belongs here: what starts
torchrun is `mgpu_ddp.isolation`.
"""

from dataclasses import dataclass

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore


@dataclass
class TorchrunConfig:
    _target_: str = "hydra_plugins.mgpu_ddp_launchers.TorchrunLauncher"
    nproc_per_node: int | str = "auto"
    """Processes of each job. auto: one per GPU, one where there is none."""
    max_restarts: int = 0
    """How often a job that crashed starts again by itself."""


class TorchrunLauncher(BasicLauncher):
    """Hydra's own launcher, with the settings of the processes that each of its jobs starts."""

    def __init__(self, nproc_per_node: int | str, max_restarts: int) -> None:
        super().__init__()
        self.nproc_per_node, self.max_restarts = nproc_per_node, max_restarts


ConfigStore.instance().store(group="hydra/launcher", name="torchrun", node=TorchrunConfig, provider="mgpu_ddp")
