"""Builds the model that the configuration names, whatever family it is of, and chooses its transform."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mgpu_ddp.config.schema import ArrayConfig, Config, ModelConfig, TimmConfig
from mgpu_ddp.data.array import open_array
from mgpu_ddp.distributed.host import available_bytes, is_out_of_memory, require_memory
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import OutOfMemoryError, UsageError
from mgpu_ddp.models.class_names import read_class_names
from mgpu_ddp.models.head import embedding_dim
from mgpu_ddp.models.lazy_dynamo import import_torchvision
from mgpu_ddp.models.model import Model
from mgpu_ddp.models.timm_models import build_timm
from mgpu_ddp.models.torchvision_models import build_torchvision
from mgpu_ddp.models.weights import in_one_line, load_weights
from mgpu_ddp.preprocess.transform import Transform, from_weights, imagenet, plain

STANDARD_SIZE = 224
"""`transform.size` as it comes: stands for a model's own size."""
WIDEST = 1 << 14
"""No head sees more features."""

BUILDERS: dict[type[ModelConfig], Callable[[Config, Any], Model]] = {
    ModelConfig: build_torchvision,
    TimmConfig: build_timm,
}
"""Families of models, by the schema class of `config.model`.

A builder takes the configuration and its `model`, and returns a `Model` on the CPU, without its weights; it raises
`UsageError` for a name, weights or number of classes that its family does not have. docs/architecture.md lists all
steps of adding a family.
"""


def load_model(config: Config, world: World) -> Model:
    """Build the model on every rank, and fill it on rank 0 alone. Collective: every rank calls this.

    Raises:
        UsageError: no such model or weights, or weights that do not fit.
    """
    names = config.model.class_names
    with world.together("load the model"):
        if world.rank == 0:
            require_head(config, available_bytes() // world.local_size)
        model = build_model(config)
        if world.rank == 0:
            load_weights(model, config.model)
            if names is not None:
                model = replace(model, class_names=read_class_names(Path(names), model.num_classes))
    if names is not None:
        model = replace(model, class_names=tuple(world.share("class names", model.class_names)))
    return model


def build_model(config: Config) -> Model:
    """Build the model on the CPU, without its weights."""
    # Before a family does so itself.
    import_torchvision()
    return BUILDERS[type(config.model)](config, config.model)


def require_head(config: Config, available: int) -> None:
    """Refuse more classes than there is memory for, given what is available.

    Raises:
        OutOfMemoryError: says how much they take.
    """
    classes = config.model.num_classes
    if classes * WIDEST * 4 > available:
        import_torchvision()
        small = replace(config.model, num_classes=1, weights=None)
        width = embedding_dim(BUILDERS[type(small)](config, small).module, 1)
        # Folding copies the module.
        num_bytes = classes * (width + 1) * 4 * (2 if config.runtime.fold else 1)
        require_memory("model.num_classes", classes, num_bytes, available, "Lower it.")


def try_size(model: Model, config: Config, transform: Transform) -> None:
    """Refuse an image size that the model cannot take, by one image of zeros. Its own size needs no trial.

    Raises:
        UsageError: the model raises for it.
    """
    own = model.preset.crop_size[0] if model.preset is not None else model.input_size or STANDARD_SIZE
    if transform.out_size == (own, own):
        return
    try:
        with torch.no_grad():
            model.module.eval()(torch.zeros(1, 3, *transform.out_size))
    except Exception as error:  # models raise all kinds
        key, size = "transform.size", transform.out_size[0]
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise OutOfMemoryError.of(key, size, error) from None
        rule, found = f"a size that {config.model.name} takes", f"{size} ({in_one_line(error)})"
        raise UsageError(f"{key} must be {rule}, got {found}. Try {key}={own}.") from None


def choose_transform(config: Config, model: Model) -> Transform:
    """`transform` with auto decided: see `TransformConfig`."""
    name, size = config.transform.name, config.transform.size
    transform = imagenet(size)
    if name == "plain" or (name == "auto" and config.data.name == "fake"):
        return plain(model.input_size if model.input_size is not None and size == STANDARD_SIZE else size)
    if name == "auto" and model.preset is not None:
        transform = from_weights(model.preset, size)
    if name == "auto" and isinstance(config.data, ArrayConfig):
        height, width = open_array(config.data.path).shape[1:3]
        if (height, width) == transform.out_size:
            return replace(transform, resize=transform.out_size, crop=None)
    return transform
