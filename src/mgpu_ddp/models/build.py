"""Builds the model that the configuration names, whatever family it is of, and chooses its transform."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mgpu_ddp.config.schema import ArrayConfig, Config, ModelConfig, TimmConfig
from mgpu_ddp.data.array import open_array
from mgpu_ddp.distributed.world import World
from mgpu_ddp.models.class_names import read_class_names
from mgpu_ddp.models.lazy_dynamo import import_torchvision
from mgpu_ddp.models.model import Model
from mgpu_ddp.models.timm_models import build_timm
from mgpu_ddp.models.torchvision_models import build_torchvision
from mgpu_ddp.models.weights import load_weights
from mgpu_ddp.preprocess.transform import Transform, from_weights, imagenet, plain

STANDARD_SIZE = 224
"""`transform.size` as it comes: stands for a model's own size."""

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
