"""Names → modules that are ready to predict: built, loaded, shared by rank 0, folded, on their device."""

import difflib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mgpu_ddp.config.checks import require
from mgpu_ddp.config.schema import ArrayConfig, Config, ModelConfig, TimmConfig
from mgpu_ddp.data.array import open_array
from mgpu_ddp.distributed.world import World
from mgpu_ddp.models.class_names import read_class_names
from mgpu_ddp.models.lazy_dynamo import import_torchvision
from mgpu_ddp.models.timm_models import build_timm, class_names_of
from mgpu_ddp.models.weights import CHECKPOINTS, load_weights
from mgpu_ddp.preprocess.transform import Transform, from_weights, imagenet, plain

log = logging.getLogger("mgpu_ddp")
OLD_INIT = ("googlenet", "inception_v3")
"""Builders that warn unless they are told how to initialise."""
STANDARD_SIZE = 224
"""Stands for a model's own size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A module with what is known about it before it runs."""

    module: nn.Module
    num_classes: int
    origin: str
    """Where the weights come from, for the log."""
    class_names: tuple[str, ...] | None
    preset: Any
    """The transform of named weights, or None."""


def load_model(config: Config, world: World) -> Model:
    """Build the model on every rank, and fill it on rank 0 alone. Collective: every rank calls this.

    Raises:
        UsageError: no such model or weights, or weights that do not fit.
    """
    with world.together("load the model"):
        model = build_model(config)
        if world.rank == 0:
            load_weights(model.module, model.num_classes, config.model)
            if config.model.class_names is not None:
                names = read_class_names(Path(config.model.class_names), model.num_classes)
                model = replace(model, class_names=names)
    if config.model.class_names is not None:
        model = replace(model, class_names=tuple(world.share("class names", model.class_names)))
    return model


def build_model(config: Config) -> Model:
    """Build the model on the CPU, without its weights."""
    torchvision = import_torchvision()
    wanted: ModelConfig = config.model
    if isinstance(wanted, TimmConfig):
        return _build_timm(config, wanted)
    names = torchvision.models.list_models(module=torchvision.models)
    require(
        wanted.name in names,
        "model.name",
        "a torchvision classification model",
        wanted.name,
        _similar(wanted.name, names),
    )
    weights = wanted.weights
    torch.manual_seed(config.seed)
    if weights is None or weights.endswith(CHECKPOINTS):
        extra = {"init_weights": True} if wanted.name in OLD_INIT else {}
        module = torchvision.models.get_model(wanted.name, weights=None, num_classes=wanted.num_classes, **extra)
        random = f"random weights from seed {config.seed} (model.weights=DEFAULT loads trained ones)"
        origin = f"{wanted.name}, {random if weights is None else f'weights from {weights}'}"
        return Model(module=module, num_classes=wanted.num_classes, origin=origin, class_names=None, preset=None)
    choices = torchvision.models.get_model_weights(wanted.name)
    known = ["DEFAULT", *(choice.name for choice in choices)]
    rule = f"null, {', '.join(known)} or a path to {'/'.join(CHECKPOINTS)}"
    require(weights in known, "model.weights", rule, weights, "Choose one of these.")
    chosen = choices[weights]
    categories = tuple(chosen.meta["categories"])
    require(
        wanted.num_classes == len(categories),
        "model.num_classes",
        f"{len(categories)} for these weights",
        wanted.num_classes,
        "Leave model.num_classes out.",
    )
    # What torchvision itself passes to these builders along with trained weights.
    trained = {"transform_input": True, "init_weights": False} if wanted.name in OLD_INIT else {}
    module = torchvision.models.get_model(wanted.name, weights=None, num_classes=len(categories), **trained)
    return Model(
        module=module,
        num_classes=len(categories),
        origin=f"{wanted.name}, weights {chosen.name}",
        class_names=categories,
        preset=chosen.transforms(),
    )


def _build_timm(config: Config, wanted: TimmConfig) -> Model:
    weights = wanted.weights
    rule = f"null, DEFAULT or a path to {'/'.join(CHECKPOINTS)} for model=timm"
    fits = weights in (None, "DEFAULT") or str(weights).endswith(CHECKPOINTS)
    require(fits, "model.weights", rule, weights, "A timm model's name may end in a tag: model.name=resnet18.a1_in1k.")
    torch.manual_seed(config.seed)
    module, preset = build_timm(wanted)
    if "embedding" in config.output.computed:
        # What a head of several layers is given is none of their inputs alone: the mean of two tokens, say.
        head = module.get_classifier()  # type: ignore[operator]
        has_one = isinstance(head, nn.Linear | nn.Conv2d)
        rule = "without embedding for a model whose classifier is not one linear layer"
        require(has_one, "output.fields", rule, f"{wanted.name} with {type(head).__name__}", "Leave it out.")
    source = f"random weights from seed {config.seed}" if weights is None else f"weights {weights}"
    return Model(
        module=module,
        num_classes=wanted.num_classes,
        origin=f"timm {wanted.name}, {source}",
        class_names=class_names_of(module) if weights == "DEFAULT" else None,
        preset=preset,
    )


def _similar(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"Did you mean {near[0]}?" if near else "torchvision.models.list_models() names them."


def choose_transform(config: Config, model: Model) -> Transform:
    """`transform` with auto decided: see `TransformConfig`."""
    name, size = config.transform.name, config.transform.size
    transform = imagenet(size)
    if name == "plain" or (name == "auto" and config.data.name == "fake"):
        # Many of timm's models take images of one size alone.
        fixed = isinstance(config.model, TimmConfig) and size == STANDARD_SIZE
        return plain(model.preset.crop_size[0] if fixed else size)
    if name == "auto" and model.preset is not None:
        transform = from_weights(model.preset, size)
    if name == "auto" and isinstance(config.data, ArrayConfig):
        height, width = open_array(config.data.path).shape[1:3]
        if (height, width) == transform.out_size:
            return replace(transform, resize=transform.out_size, crop=None)
    return transform
