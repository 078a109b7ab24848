"""A job makes a run folder its own, and tells all ranks where to begin."""

import os
import platform
import secrets
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from mgpu_ddp import __version__
from mgpu_ddp.config.checks import protocol_of
from mgpu_ddp.config.schema import Config, FolderConfig, ListConfig, Listed, TimmConfig
from mgpu_ddp.data.datasets import identity, open_samples
from mgpu_ddp.data.listing import FILE_NAME, Listing
from mgpu_ddp.distributed import slurm
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import UsageError
from mgpu_ddp.job.context import Claim, Setup
from mgpu_ddp.job.job import Job
from mgpu_ddp.job.plan import batch_size_of, dataset_range
from mgpu_ddp.models.class_names import names_digest
from mgpu_ddp.models.head import embedding_dim
from mgpu_ddp.models.model import Model
from mgpu_ddp.models.weights import weights_digest
from mgpu_ddp.output.manifest import Manifest, write_status
from mgpu_ddp.output.parts import write_error
from mgpu_ddp.output.replace import NEXT, holds_result, is_half_replaced, put_in_place
from mgpu_ddp.output.run_folder import claim_folder, hold_folder, to_continue


def fingerprint(setup: Setup) -> dict[str, Any]:
    """The keys that decide what the rows say, resolved. Rank 0 only."""
    config, model, resolved = setup.job.config, setup.model, setup.resolved
    runtime, device = config.runtime, setup.world.device
    return {
        **{f"data.{key}": value for key, value in asdict(config.data).items()},
        "listing": identity(config),
        **{f"transform.{k}": list(v) if isinstance(v, tuple) else v for k, v in asdict(resolved.transform).items()},
        "model.name": ("timm/" if isinstance(config.model, TimmConfig) else "") + config.model.name,
        "model.num_classes": model.num_classes,
        "model.weights": weights_digest(model.module),
        "model.class_names": names_digest(model.class_names) if config.model.class_names else None,
        "strategy": config.strategy,
        "runtime.device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "runtime.precision": resolved.precision,
        "runtime.channels_last": runtime.channels_last,
        "runtime.decode": resolved.decode,
        "runtime.fold": runtime.fold,
        "runtime.deterministic": runtime.deterministic,
        "runtime.compile": resolved.compile,
        "output.format": config.output.format,
        "output.fields": sorted(config.output.fields),
        "output.topk": config.output.topk,
        "output.dtype": config.output.dtype,
    }


def array_columns(config: Config, model: Model) -> int | None:
    """The width of `predictions.npy`, where that is the format."""
    if config.output.format != "npy":
        return None
    return (
        model.num_classes if config.output.array_field == "logits" else embedding_dim(model.module, model.num_classes)
    )


def place_job(job: Job, world: World) -> Job:
    """The job with the place where it works: beside an older result until it is complete. Collective.

    Raises:
        UsageError: another job holds the folder.
    """
    if job.config.dry_run:
        return job
    place: tuple[bool, bool] | None = None
    with world.together("find the run folder"):
        if world.rank == 0:
            place = _find_place(job.run_dir, job.config.overwrite, world)
    beside, starts_over = world.share("place", place)
    if not beside:
        return job
    return replace(job, run_dir=job.run_dir / NEXT, replaces=job.run_dir, starts_over=starts_over)


def _find_place(run_dir: Path, overwrite: bool, world: World) -> tuple[bool, bool]:
    """(whether the job works beside an older result, whether it discards what is there)."""
    if is_half_replaced(run_dir):
        held = hold_folder(run_dir)
        put_in_place(run_dir)
        os.close(held)
    # Neither a restart by torchrun nor a requeue by SLURM is another launch.
    again = world.is_done(f"overwrite/{run_dir}") or (
        slurm.is_requeued() and any(_begun_by(folder) == slurm.job_id() for folder in (run_dir, run_dir / NEXT))
    )
    starts_over = overwrite and not again and holds_result(run_dir)
    return starts_over or (run_dir / NEXT).exists(), starts_over


def _begun_by(folder: Path) -> str:
    """The SLURM job that a folder's job began in."""
    manifest = Manifest.read(folder)
    return manifest.slurm_job if manifest else ""


def found_manifest(job: Job, world: World) -> Manifest | None:
    """The manifest that the run folder was begun with, on rank 0; None for a fresh start. Collective."""
    with world.together("read the manifest"):
        return Manifest.read(job.run_dir) if world.rank == 0 and not job.starts_over else None


def known_listing(job: Job, before: Manifest | None, world: World) -> Listing | None:
    """The listing of a folder that is continued: it alone says which index is which file. Collective.

    On rank 0, and None for a fresh start; a list is its own listing.
    """
    with world.together("read the listing"):
        is_listed = isinstance(job.config.data, Listed) and not isinstance(job.config.data, ListConfig)
        return Listing.open(job.run_dir / FILE_NAME) if before is not None and is_listed else None


def claim_job(setup: Setup) -> Claim:
    """Make the run folder this job's and tell all ranks where to begin. Collective: every rank calls this.

    Raises:
        UsageError: the folder holds another job or cannot be written to.
    """
    job, world, files = setup.job, setup.world, setup.files
    config, run_dir = job.config, job.run_dir
    manifest: Manifest | None = None
    held: int | None = None
    with world.together("claim the run folder"):
        if world.rank == 0:
            length = len(open_samples(config, files))
            start, stop = dataset_range(config, length)
            wanted = Manifest(
                fingerprint=fingerprint(setup),
                start=start,
                stop=stop,
                batch_size=batch_size_of(config, setup.resolved.batch_size, length),
                world_sizes=[world.size],
                versions=versions(),
                slurm_job=slurm.job_id(),
                shard=config.shard,
            )
            if files is not None:
                wanted.fingerprint["listing"] = files.digest(stop)
            # A restarted attempt finds what the dead one of the same launch has left.
            resume = config.resume or world.attempt > 0
            if not job.starts_over:
                to_continue(run_dir, wanted, resume=resume, files=files)
            # What is refused must not even be touched by a lock; what is not may change until the lock is there.
            held = hold_folder(job.home)
            manifest = claim_folder(
                run_dir,
                wanted,
                resume=resume,
                overwrite=job.starts_over,
                batch_size_given=job.batch_size_given,
                array_columns=array_columns(config, setup.model),
                files=files,
            )
            if config.overwrite:
                # Not before: an attempt that dies until here has put nothing in the place of what it found.
                world.mark_done(f"overwrite/{job.home}")
            try:
                _furnish(job, manifest)
            except OSError as error:
                raise write_error(run_dir, error) from error
    mine: dict[str, Any] | None = None
    if manifest is not None:
        mine = {name: getattr(manifest, name) for name in ("start", "stop", "prefix", "errors", "batch_size")}
        mine["token"] = secrets.token_hex(3)
    shared = world.share("claim", mine)
    with world.together("open the samples"):
        if isinstance(config.data, Listed):
            files = Listing.open(run_dir / FILE_NAME)
        samples = open_samples(config, files)
        data = config.data
        if isinstance(data, FolderConfig) and not protocol_of(data.root) and not os.path.isdir(data.root):
            raise UsageError(
                f"data.root must be there on every node, got none at {data.root!r} on rank {world.rank} of"
                f" {world.size} ({os.uname().nodename}). Mount it."
            )
    return Claim(**shared, manifest=manifest, held=held, folder=run_dir, samples=samples)


def _furnish(job: Job, manifest: Manifest) -> None:
    """Put what belongs into a claimed folder: the composed configuration and the status."""
    if job.hydra_files:
        (job.run_dir / ".hydra").mkdir(exist_ok=True)
        for name, node in job.hydra_files.items():
            OmegaConf.save(node, job.run_dir / ".hydra" / name)
    if not manifest.complete:
        write_status(job.run_dir, "running", manifest)


def versions() -> dict[str, str]:
    """Versions of what makes the rows, for the manifest."""
    import pyarrow
    import torchvision

    timm = sys.modules.get("timm")
    return {
        "mgpu_ddp": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "pyarrow": pyarrow.__version__,
        **({"timm": timm.__version__} if timm else {}),
    }
