"""A job's choices, for tests of the rooms that are handed them."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from mgpu_ddp.config.resolved import Resolved
from mgpu_ddp.config.schema import Config
from mgpu_ddp.distributed.world import World
from mgpu_ddp.inference.predictor import Predictor
from mgpu_ddp.job.cache import Kept
from mgpu_ddp.job.context import Predictors, Setup
from mgpu_ddp.job.job import Job
from mgpu_ddp.models.model import Model
from mgpu_ddp.output.run_folder import RunFolder
from mgpu_ddp.preprocess.transform import plain


def resolved(**changes: Any) -> Resolved:
    """The choices of a small job in fp32 on the CPU."""
    choices: dict[str, Any] = {
        "precision": "fp32",
        "decode": "cpu",
        "compile": "off",
        "workers": 0,
        "collect": "gather",
        "batch_size": 4,
        "transform": plain(8),
    }
    return Resolved(**choices | changes)


@dataclass
class PredictorsOf:
    """Makes predictors of one module, whatever the job's own model is."""

    module: nn.Module
    config: Config
    world: World

    def get(self, choices: Resolved, *, keep_model: bool = True) -> Predictor:
        return Predictor(self.module, self.config, choices, self.world.device)


def setup(job: Job, model: Model, world: World, predictors: Any = None, **changes: Any) -> Setup:
    """A set-up job without a listing, in its folder as it is found now."""
    return Setup(
        job=job,
        world=world,
        model=model,
        files=None,
        folder=RunFolder.place(job.run_dir, overwrite=job.config.overwrite),
        resolved=resolved(**changes),
        predictors=predictors or Predictors(kept=Kept(), model=model, config=job.config, world=world, warm=None),
    )
