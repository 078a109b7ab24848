"""Builds the model that the configuration names, whatever family it is of."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mgpu_ddp.config.keys import Section
from mgpu_ddp.config.schema import (
    Config,
    HfConfig,
    ModelConfig,
    PluginConfig,
    ScriptModelConfig,
    TimmConfig,
    num_outcomes,
)
from mgpu_ddp.config.script import Script
from mgpu_ddp.distributed.host import available_bytes, is_out_of_memory, require_memory
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import OutOfMemoryError, UsageError
from mgpu_ddp.models.checkpoint import Checkpoint, in_one_line, is_checkpoint, read_checkpoint
from mgpu_ddp.models.class_names import read_class_names
from mgpu_ddp.models.head import embedding_dim
from mgpu_ddp.models.hf_models import load_hf
from mgpu_ddp.models.input_transform import STANDARD_SIZE
from mgpu_ddp.models.lazy_dynamo import import_torchvision
from mgpu_ddp.models.model import RANDOM_CLASSES, Model
from mgpu_ddp.models.script_model import build_script_model
from mgpu_ddp.models.timm_hub import read_hosted
from mgpu_ddp.models.timm_models import build_timm
from mgpu_ddp.models.torchvision_models import build_torchvision
from mgpu_ddp.models.weights import count_classes, load_weights
from mgpu_ddp.models.zero_shot import classify, open_zero_shot
from mgpu_ddp.preprocess.transform import AnyTransform, Transform

log = logging.getLogger("mgpu_ddp")

Hosted = dict[str, Any] | None
WIDEST = 1 << 14
"""No head sees more features."""

BUILDERS: dict[type[Section], Callable[[Config, Any, Script], Model]] = {
    ModelConfig: lambda config, wanted, script: build_torchvision(config, wanted),
    TimmConfig: lambda config, wanted, script: build_timm(config, wanted),
    PluginConfig: lambda config, wanted, script: build_script_model(script, config.seed, wanted.name),
    ScriptModelConfig: lambda config, wanted, script: build_script_model(script, config.seed),
}
"""Families of models, by the schema class of `config.model`.

A builder takes the configuration, its `model` and what the script brings, and returns a `Model` on the CPU, without its
named weights; it raises `UsageError` for a name, weights or number of classes that its family does not have. A model
of the hub takes more than that: `load_hf`.
docs/architecture.md lists all steps of adding a family.
"""


def load_model(config: Config, script: Script, world: World) -> Model:
    """Build the model on every rank, and fill it on rank 0 alone. Collective: every rank calls this.

    Raises:
        UsageError: no such model or weights, or weights that do not fit.
    """
    classes = open_zero_shot(config, world)
    if isinstance(config.model, HfConfig):
        model = load_hf(config, config.model, world)
        with world.together("name the classes"):
            return model if classes is None else classify(model, classes, str(config.model.zero_shot))
    hosted = read_hosted(config.model, world)
    config, checkpoint = _open_checkpoint(config, world, hosted)
    if classes is not None and config.model.weights is None:
        config = replace(config, model=replace(config.model, num_classes=classes.width))
    with world.together("load the model"):
        if world.rank == 0 and isinstance(config.model, ModelConfig):
            require_head(config, config.model, available_bytes() // world.local_size)
        model = build_model(config, script, hosted)
        if world.rank == 0 and isinstance(config.model, ModelConfig):
            load_weights(model, config.model, checkpoint)
        if classes is not None:
            model = classify(model, classes, config.model.zero_shot)
    return name_classes(model, config, world)


def _open_checkpoint(config: Config, world: World, hosted: Hosted) -> tuple[Config, Checkpoint | None]:
    """Read the checkpoint on rank 0, and take its number of classes where none is given. Collective."""
    wanted, checkpoint, num_classes = config.model, None, None
    if not isinstance(wanted, ModelConfig) or not is_checkpoint(wanted.weights):
        return config, None
    with world.together("read the checkpoint"):
        if world.rank == 0:
            checkpoint = read_checkpoint(Path(str(wanted.weights)))
            if wanted.num_classes is None:
                num_classes = count_classes(outline(config, hosted), checkpoint)
    if wanted.num_classes is None and (num_classes := world.share("number of classes", num_classes)) is not None:
        config = replace(config, model=replace(wanted, num_classes=num_classes))
        if world.rank == 0:
            log.info("model.num_classes=%d, as the checkpoint has it", num_classes)
    return config, checkpoint


def outline(config: Config, hosted: Hosted = None) -> Model:
    """The model without memory for its weights, where its builder goes without."""
    import_torchvision()
    try:
        with torch.device("meta"):
            return build_model(config, hosted=hosted)
    except Exception:
        # Some compute with tensors as they build, and a mistake is told the same way again.
        return build_model(config, hosted=hosted)


def build_model(config: Config, script: Script | None = None, hosted: Hosted = None) -> Model:
    """Build the model on the CPU, without its named weights. `hosted` is what its repository says of it."""
    # Before a family does so itself.
    import_torchvision()
    if hosted is not None:
        return build_timm(config, config.model, hosted)
    return BUILDERS[type(config.model)](config, config.model, script or Script())


def require_head(config: Config, wanted: ModelConfig, available: int) -> None:
    """Refuse more classes than there is memory for, given what is available.

    Raises:
        OutOfMemoryError: says how much they take.
    """
    classes = wanted.num_classes or RANDOM_CLASSES
    if classes * WIDEST * 4 > available:
        import_torchvision()
        small = replace(wanted, num_classes=1, weights=None)
        width = embedding_dim(BUILDERS[type(small)](config, small, Script()).module, 1)
        # Folding copies the module.
        num_bytes = classes * (width + 1) * 4 * (2 if config.runtime.fold else 1)
        require_memory("model.num_classes", classes, num_bytes, available, "Lower it.")


def try_size(model: Model, config: Config, transform: AnyTransform) -> None:
    """Refuse an image size that the model cannot take, by one image of zeros. Its own size needs no trial.

    Raises:
        UsageError: the model raises for it.
    """
    own = model.input_size or (model.preset.crop_size[0] if model.preset is not None else None)
    own = own or (None if model.is_tried else STANDARD_SIZE)
    if own is None or not isinstance(transform, Transform) or transform.out_size == (own, own):
        return
    try:
        with torch.no_grad():
            model.module.eval()(torch.zeros(1, 3, *transform.out_size))
    except Exception as error:  # models raise all kinds
        key = config.transform.size_key(cropped=transform.crop is not None)
        height, width = transform.out_size
        size = height if height == width else f"{height}x{width}"
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise OutOfMemoryError.of(key, size, error) from None
        remedy = f"[{own},{own}]" if key == "transform.resize" else own
        rule, found = f"a size that {config.model.name} takes", f"{size} ({in_one_line(error)})"
        raise UsageError(f"{key} must be {rule}, got {found}. Try {key}={remedy}.") from None


def name_classes(model: Model, config: Config, world: World) -> Model:
    """Take the names of `model.class_names`, once the number of classes is known. Collective: every rank calls this."""
    path = config.model.class_names
    if path is None or model.num_classes is None:
        return model
    names: tuple[str, ...] = ()
    with world.together("read the class names"):
        if world.rank == 0:
            names = read_class_names(Path(path), num_outcomes(model.num_classes))
    return replace(model, class_names=tuple(world.share("class names", names)))
