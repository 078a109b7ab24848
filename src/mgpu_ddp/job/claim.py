"""Rank 0 claims the run folder for a job, and tells all ranks where to begin."""

import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from mgpu_ddp import __version__
from mgpu_ddp.config.checks import protocol_of, require
from mgpu_ddp.config.schema import Config, FolderConfig, ListConfig, Listed, dataset_range
from mgpu_ddp.data.datasets import identity, open_samples
from mgpu_ddp.data.encoded import SIZE
from mgpu_ddp.data.listing import FILE_NAME, Listing
from mgpu_ddp.data.samples import Samples
from mgpu_ddp.data.script_dataset import ScriptDataset
from mgpu_ddp.distributed import slurm
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import UsageError
from mgpu_ddp.job.context import Claim, Setup
from mgpu_ddp.job.job import Job
from mgpu_ddp.job.plan import batch_size_of
from mgpu_ddp.models.class_names import names_digest
from mgpu_ddp.models.weights import weights_digest
from mgpu_ddp.output.atomic_files import replace_bytes
from mgpu_ddp.output.columns import BOX, ColumnType, as_json, carried_names
from mgpu_ddp.output.layout import check_layout, lies_in_the_way
from mgpu_ddp.output.manifest import Manifest, Start
from mgpu_ddp.output.parts import write_error
from mgpu_ddp.output.run_folder import RunFolder


def fingerprint(setup: Setup) -> dict[str, Any]:
    """The keys that decide what the rows say, resolved. Rank 0 only."""
    config, model, resolved = setup.job.config, setup.model, setup.resolved
    runtime, device = config.runtime, setup.world.device
    return {
        **{f"data.{key}": value for key, value in asdict(config.data).items() if not _is_free(config.data, key)},
        "listing": identity(config),
        **{f"transform.{key}": value for key, value in resolved.transform.described().items()},
        **model.identity,
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


def _is_free(data: Any, key: str) -> bool:
    """True for a key that binds no later start: what it finds is another thing, or it was not there once."""
    was_not_there = key == "carry" or (key == "extensions" and isinstance(data, FolderConfig | ListConfig))
    return key == "check" or (was_not_there and not getattr(data, key))


def array_shape(config: Config, types: Sequence[ColumnType]) -> tuple[int, ...] | None:
    """The shape of a row of `predictions.npy`, where that is the format."""
    return types[-1].shape if config.output.format == "npy" else None


def place_job(job: Job, world: World) -> RunFolder:
    """Find the folder in which the job works. Collective: every rank calls this.

    Raises:
        UsageError: another job holds the folder.
    """
    folder = RunFolder(home=job.run_dir)
    with world.together("find the run folder"):
        if world.rank == 0:
            folder = _place(job, world)
    beside, starts_over = world.share("place", (folder.beside, folder.starts_over))
    return folder if world.rank == 0 else RunFolder(home=job.run_dir, beside=beside, starts_over=starts_over)


def _place(job: Job, world: World) -> RunFolder:
    refuse_inputs_in_the_way(job)
    if job.config.dry_run:
        check_layout(job.run_dir)
        return RunFolder(home=job.run_dir, before=Manifest.read(job.run_dir))
    # Neither a restart by torchrun nor a requeue by SLURM is another launch.
    folder = RunFolder.place(
        job.run_dir,
        overwrite=job.config.overwrite and not world.is_done(f"overwrite/{job.run_dir}"),
        requeued_job=slurm.job_id() if slurm.is_requeued() else "",
    )
    folder.next_command = job.next_command
    return folder


def refuse_inputs_in_the_way(job: Job) -> None:
    """Refuse inputs at a path in the run folder that the job would write, move or delete.

    Raises:
        UsageError: names the key.
    """
    config, home = job.config, os.path.realpath(job.run_dir)
    sections = {"data": config.data, "model": config.model}
    inputs = {f"{group}.{key}": value for group, section in sections.items() for key, value in asdict(section).items()}
    for key, value in inputs.items():
        if isinstance(value, str) and not protocol_of(value):
            name = os.path.relpath(os.path.realpath(value), home)
            rule = f"outside of the files that a job writes into {str(job.run_dir)!r}"
            require(not lies_in_the_way(name), key, rule, value, "Copy it elsewhere, or choose another output.dir.")


def known_listing(config: Config, folder: RunFolder, world: World) -> Listing | None:
    """The listing that the job continues, on rank 0. Collective: every rank calls this.

    None for a fresh start.
    """
    with world.together("read the listing"):
        return folder.known_listing() if isinstance(config.data, Listed) else None


def claim_job(setup: Setup) -> Claim:
    """Make the run folder this job's and tell all ranks where to begin. Collective: every rank calls this.

    Raises:
        UsageError: the folder holds another job or cannot be written to.
    """
    world = setup.world
    mine: dict[str, Any] | None = None
    with world.together("claim the run folder"):
        if world.rank == 0:
            manifest = _claim(setup)
            changed = setup.folder.changed_rows()
            mine = {name: getattr(manifest, name) for name in ("start", "stop", "prefix", "batch_size", "token")}
            mine |= {"errors": manifest.errors - len(changed), "changed": changed}
    shared = world.share("claim", mine)
    with world.together("open the samples"):
        samples = _open_claimed_samples(setup)
    return Claim(**shared | {"changed": np.array(shared["changed"], dtype=np.int64)}, samples=samples)


def _claim(setup: Setup) -> Manifest:
    job, world, folder, files = setup.job, setup.world, setup.folder, setup.files
    manifest = folder.claim(
        _fresh_manifest(setup),
        files,
        # A restarted attempt finds what the dead one of the same launch has left.
        resume=job.config.resume or world.attempt > 0,
        batch_size_given=job.batch_size_given,
        array_shape=array_shape(job.config, setup.types),
    )
    if job.config.overwrite:
        # Only now: an attempt that died earlier has overwritten nothing.
        world.mark_done(f"overwrite/{folder.home}")
    try:
        _write_hydra_files(job, folder)
        folder.mark_running()
    except OSError as error:
        raise write_error(folder.path, error) from error
    return manifest


def _fresh_manifest(setup: Setup) -> Manifest:
    """The manifest of this job with nothing done yet."""
    config, files = setup.job.config, setup.files
    length = len(open_samples(config, files))
    start, stop = dataset_range(config, length)
    age_s = time.perf_counter() - setup.predictors.kept.began
    manifest = Manifest(
        fingerprint=fingerprint(setup),
        start=start,
        stop=stop,
        batch_size=batch_size_of(config, setup.resolved.batch_size, length),
        world_sizes=[setup.world.size],
        versions=versions(),
        slurm_job=slurm.job_id(),
        shard=config.shard,
        columns=as_json([*carried_types(setup), *setup.types]),
        starts=[Start(began=round(time.time() - age_s, 3), ranks=setup.world.size)],
        weights=setup.resolved.weights,
    )
    if files is not None:
        manifest.fingerprint["listing"] = files.digest(stop)
    if isinstance(files, Listing):
        manifest.left_out = files.left_out
    return manifest


def carried_types(setup: Setup) -> list[ColumnType]:
    """The columns that samples carry. Of a listing on rank 0 only, where there is one."""
    config, files = setup.job.config, setup.files
    types = [BOX] if config.boxes else []
    if isinstance(files, ScriptDataset):
        carried = files.kind.carried
        types += [ColumnType(name=name, dtype=dtype) for name, dtype in carried.items() if name != "path"]
    if "size" in config.output.fields:
        types += [ColumnType(name=name, dtype="int32") for name in SIZE]
    if isinstance(files, Listing):
        names = carried_names(files.carried.names, setup.types)
        types += [ColumnType.carried(names[field.name], field.type) for field in files.carried]
    return types


def _write_hydra_files(job: Job, folder: RunFolder) -> None:
    if job.hydra_files:
        (folder.path / ".hydra").mkdir(exist_ok=True)
        for name, node in job.hydra_files.items():
            replace_bytes(folder.path / ".hydra" / name, OmegaConf.to_yaml(node).encode())


def _open_claimed_samples(setup: Setup) -> Samples:
    """The samples as the folder's own listing has them."""
    config, world, data = setup.job.config, setup.world, setup.job.config.data
    files = Listing.open(setup.folder.path / FILE_NAME) if isinstance(data, Listed) else setup.files
    samples = open_samples(config, files)
    if isinstance(data, FolderConfig) and not protocol_of(data.root) and not os.path.isdir(data.root):
        raise UsageError(
            f"data.root must be there on every node, got none at {data.root!r} on rank {world.rank} of"
            f" {world.size} ({os.uname().nodename}). Mount it."
        )
    return samples


def versions() -> dict[str, str]:
    """Versions of what makes the rows, for the manifest."""
    import pyarrow
    import torchvision

    found: dict[str, Any] = {name: sys.modules.get(name) for name in ("timm", "transformers")}
    return {
        "mgpu_ddp": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "pyarrow": pyarrow.__version__,
        **{name: library.__version__ for name, library in found.items() if library},
    }
