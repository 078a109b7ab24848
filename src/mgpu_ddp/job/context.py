"""The objects a job works with: before it claims its run folder, once it has, and while it predicts."""

from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mgpu_ddp.config.resolved import Resolved
from mgpu_ddp.config.schema import Config
from mgpu_ddp.data.listing import Listing
from mgpu_ddp.data.samples import Samples
from mgpu_ddp.data.script_dataset import ScriptDataset
from mgpu_ddp.distributed.signals import StopWish
from mgpu_ddp.distributed.world import World
from mgpu_ddp.inference.clock import Clock
from mgpu_ddp.inference.predictor import Predictor
from mgpu_ddp.job.cache import Kept
from mgpu_ddp.job.job import Job
from mgpu_ddp.models.model import Model
from mgpu_ddp.models.prepare import prepare
from mgpu_ddp.output.columns import ColumnType
from mgpu_ddp.output.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictors:
    """Makes the predictor for a `Resolved`, or takes over the one of the job before."""

    kept: Kept
    model: Model
    config: Config
    world: World
    warm: Future[None] | None
    """Done once the device and its decoder are ready."""

    def get(self, resolved: Resolved, *, keep_model: bool = True) -> Predictor:
        """A predictor. Collective: every rank calls this. Without `keep_model` it may use up the model's module."""
        model, config, device = self.model, self.config, self.world.device

        def make() -> Predictor:
            module = prepare(model, config, resolved, self.world, keep=keep_model)
            return Predictor(module, config, resolved, device, num_classes=model.num_classes, outputs=model.outputs)

        key = Predictor.depends_on(config, resolved, device)
        predictor = self.kept.get("predictor", key, make)
        if self.warm is not None:
            # Before a graph is recorded, which another thread's work would spoil, and before the loader forks: a
            # thread that is importing would leave import locks held in the workers.
            self.warm.result()
        return predictor


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """A job that is ready to claim its run folder."""

    job: Job
    world: World
    """With the device."""
    model: Model
    files: Listing | ScriptDataset | None
    """On rank 0 the listing, where the data have one; on all ranks the script's dataset."""
    folder: RunFolder
    resolved: Resolved
    predictors: Predictors
    types: tuple[ColumnType, ...] = ()
    """The columns that become of the model's outputs."""
    bitwise: bool = True
    """Rows keep their bits whatever their neighbours are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """Each rank's knowledge of the run folder, once it is this job's."""

    start: int
    """The job's range of dataset indices is [start, stop)."""
    stop: int
    prefix: int
    """The first index that is not committed yet."""
    errors: int
    """Error rows committed before, without those of changed images."""
    changed: npt.NDArray[np.int64]
    """Samples whose images have changed since they were predicted."""
    batch_size: int
    token: str
    """Tells this attempt from others; part names carry it."""
    samples: Samples


@dataclass(frozen=True, kw_only=True, slots=True)
class JobContext:
    """A job that has claimed its run folder: what predicting and finishing it needs."""

    job: Job
    world: World
    stop: StopWish
    model: Model
    resolved: Resolved
    folder: RunFolder
    claim: Claim
    predictor: Predictor
    clock: Clock
    types: tuple[ColumnType, ...]
    bitwise: bool

    @property
    def config(self) -> Config:
        return self.job.config
