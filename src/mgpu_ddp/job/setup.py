"""Everything a job needs before it claims its run folder: device, place, model, listing, and each `auto` decided."""

import logging
from dataclasses import replace

from mgpu_ddp.config.checks import require
from mgpu_ddp.config.resolved import RANDOM, Resolved, is_on_gpu
from mgpu_ddp.config.schema import AUTO, Config, FakeConfig, ModelConfig, PluginConfig
from mgpu_ddp.data.datasets import find_listing
from mgpu_ddp.data.listing import Listing
from mgpu_ddp.data.script_dataset import bring_dataset
from mgpu_ddp.distributed import host
from mgpu_ddp.distributed.devices import choose_device
from mgpu_ddp.distributed.signals import StopWish
from mgpu_ddp.distributed.world import World
from mgpu_ddp.inference.clock import Clock
from mgpu_ddp.inference.gpu_input import decode_of, warm_up
from mgpu_ddp.inference.outputs import types_of_classes
from mgpu_ddp.inference.pipeline import in_flight
from mgpu_ddp.job.autotune import DEFAULT_BATCH_SIZE, choose_compile, find_batch_size
from mgpu_ddp.job.cache import Kept
from mgpu_ddp.job.claim import carried_types, known_listing, place_job
from mgpu_ddp.job.context import Claim, JobContext, Predictors, Setup
from mgpu_ddp.job.job import Job
from mgpu_ddp.job.memory import require_room
from mgpu_ddp.job.try_model import check_neighbours, try_model
from mgpu_ddp.loader.loader import num_workers
from mgpu_ddp.models.build import load_model, try_size
from mgpu_ddp.models.head import embedding_dim
from mgpu_ddp.models.input_transform import choose_transform
from mgpu_ddp.models.model import Model
from mgpu_ddp.models.plugin_model import with_plugin
from mgpu_ddp.models.prepare import precision_of, speedups_of
from mgpu_ddp.models.script_transform import script_transform
from mgpu_ddp.output.columns import OURS, ColumnType, carried_names
from mgpu_ddp.output.formats import is_readable
from mgpu_ddp.output.manifest import Manifest
from mgpu_ddp.output.no_pandas import keep_pandas_out

log = logging.getLogger("mgpu_ddp")


def set_up(job: Job, world: World, kept: Kept) -> Setup:
    """Find or make what the job needs, and touch nothing. Collective: every rank calls this.

    Raises:
        UsageError: no such device, model, weights or images, or the run folder is in use.
        OutOfMemoryError: the model, an image or a batch does not fit into memory.
    """
    kept.begin()
    config = job.config
    world.heartbeat.timeout_s = config.dist.timeout_s
    world = choose_device(config, world)
    keep_pandas_out()
    if isinstance(config.model, PluginConfig):
        job = replace(job, script=with_plugin(job.script, config, world))
    dataset = bring_dataset(job.script, world, in_shards=config.shard is not None)
    with world.together("choose the decoder"):
        own_transform = script_transform(job.script, dataset, config.transform)
        decode = decode_of(config, world.device, dataset, own_transform)
    # Before there are threads and workers, which inherit it.
    host.keep_off(host.interrupted_cpus() if is_on_gpu(decode) else frozenset(), world.cpus)
    warm = warm_up(world.device, decodes=is_on_gpu(decode)) if world.device.type == "cuda" else None
    folder = place_job(job, world)
    job = choose_weights(job, folder.before, world)
    config = job.config
    # Before the images are listed, which may take minutes: a model that does not exist is refused within seconds.
    depends_on = [config.model, config.seed, config.output.computed]
    model = kept.get("model", depends_on, lambda: load_model(config, job.script, world))
    files = dataset or find_listing(config, known_listing(config, folder, world), world)
    with world.together("choose the transform"):
        transform = choose_transform(config, model, own_transform)
    setup = Setup(
        job=job,
        world=world,
        model=model,
        files=files,
        folder=folder,
        predictors=Predictors(kept=kept, model=model, config=config, world=world, warm=warm),
        resolved=Resolved(
            precision=precision_of(config.runtime, world.device),
            decode=decode,
            compile=config.runtime.compile,
            workers=num_workers(config, world),
            collect=config.collect,
            batch_size=DEFAULT_BATCH_SIZE if config.batch_size == "auto" else int(config.batch_size),
            transform=transform,
            speedups=speedups_of(config),
            weights=model.weights,
        ),
    )
    with world.together("see whether it fits"):
        if world.rank == 0:
            require_room(setup)
            try_size(model, config, setup.resolved.transform)
    setup = try_model(setup) if model.is_tried else replace(setup, types=types_of(model, config))
    if setup.model.num_classes == 1 and world.rank == 0:
        log.info("one logit a row: its sigmoid is the probability of class 1, and pred is 0 or 1")
    if getattr(config.data, "carry", []):
        with world.together("name what is carried"):
            if isinstance(setup.files, Listing):
                check_listed(setup, setup.files)
    else:
        check_carried(setup)
    return setup if config.dry_run else _measured(setup)


def choose_weights(job: Job, before: Manifest | None, world: World) -> Job:
    """The job with `model.weights=auto` decided; `before` is the manifest that it continues, on rank 0. Collective."""
    config = job.config
    if not isinstance(config.model, ModelConfig) or config.model.weights != AUTO:
        return job
    chosen = None if isinstance(config.data, FakeConfig) else "DEFAULT"
    if before is not None and before.fingerprint.get("model.name") in (config.model.name, f"timm/{config.model.name}"):
        # Folders that do not name theirs were begun when the default was random.
        chosen = None if before.weights == RANDOM else before.weights
    chosen = world.share("weights", chosen)
    return replace(job, config=replace(config, model=replace(config.model, weights=chosen)))


def check_carried(setup: Setup) -> None:
    """Check that what a dataset's items carry has names of its own.

    Raises:
        UsageError: a column of that name is there already.
    """
    taken = {*OURS, *(each.name for each in setup.types)}
    for each in carried_types(setup):
        rule = f"named otherwise than the columns {', '.join(sorted(taken))}"
        require(each.name not in taken, "what a dataset carries", rule, each.name, "Rename it.")


def check_listed(setup: Setup, files: Listing) -> None:
    """Say what columns of a list or of Parquet files are called, and check that the format can hold them.

    Raises:
        UsageError: it cannot.
    """
    how, names = setup.job.config.output.format, carried_names(files.carried.names, setup.types)
    for field in files.carried:
        rule = f"parquet for the column {field.name!r} of {field.type}"
        require(is_readable(field.type, how), "output.format", rule, how, "Leave it out.")
    renamed = [f"{name} as {column}" for name, column in names.items() if name != column]
    if renamed:
        log.info("data.carry: %s, since the table has columns of these names", ", ".join(renamed))


def types_of(model: Model, config: Config) -> tuple[ColumnType, ...]:
    """The columns of a model that is known to return logits."""
    assert model.num_classes is not None
    width = embedding_dim(model.module, model.num_classes) if "embedding" in config.output.computed else 0
    return types_of_classes(config.output, model.num_classes, width)


def _measured(setup: Setup) -> Setup:
    """Decide what takes a run of the model: `compile`, then `batch_size`. Collective: every rank calls this."""
    setup = replace(setup, resolved=replace(setup.resolved, compile=choose_compile(setup)))
    setup = replace(setup, resolved=replace(setup.resolved, batch_size=find_batch_size(setup)))
    return check_neighbours(setup) if setup.model.is_tried else setup


def begin(setup: Setup, claim: Claim, stop: StopWish) -> JobContext:
    """Make the predictor and start the clock. Collective: every rank calls this."""
    kept, streams = setup.predictors.kept, setup.resolved.speedups.streams
    predictor = setup.predictors.get(setup.resolved, keep_model=setup.job.in_sweep)
    return JobContext(
        job=setup.job,
        world=setup.world,
        stop=stop,
        model=setup.model,
        resolved=replace(setup.resolved, batch_size=claim.batch_size),
        folder=setup.folder,
        claim=claim,
        predictor=predictor,
        clock=Clock(warm_up=in_flight(setup.world, streams), began=kept.began, reused=tuple(kept.reused)),
        types=setup.types,
        bitwise=setup.bitwise,
    )
