"""torchvision's classification models: built by name, with random or named weights."""

import logging
from functools import partial
from pathlib import Path
from urllib.request import urlopen

import torch

from mgpu_ddp.config.checks import require
from mgpu_ddp.config.schema import Config, ModelConfig
from mgpu_ddp.config.script import CHECKPOINTS
from mgpu_ddp.errors import UsageError
from mgpu_ddp.models.checkpoint import in_one_line, is_checkpoint, weights_name
from mgpu_ddp.models.model import RANDOM_CLASSES, Model, State, other_classes
from mgpu_ddp.models.names import way_from_torchvision
from mgpu_ddp.models.network import REACH_S, within

log = logging.getLogger("mgpu_ddp")

OLD_INIT = ("googlenet", "inception_v3")
"""Builders that warn unless they are told how to initialise."""


def build_torchvision(config: Config, wanted: ModelConfig) -> Model:
    """Build the model that `wanted` names.

    Raises:
        UsageError: torchvision has no such model or weights, or the weights have other classes.
    """
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    if wanted.name not in names:
        remedy = way_from_torchvision(wanted.name)
        require(False, "model.name", "a torchvision classification model", wanted.name, remedy)
    torch.manual_seed(config.seed)
    if wanted.weights is None or is_checkpoint(wanted.weights):
        return _without_named_weights(wanted, config.seed)
    return _with_named_weights(wanted, wanted.weights)


def _without_named_weights(wanted: ModelConfig, seed: int) -> Model:
    import torchvision

    extra = {"init_weights": True} if wanted.name in OLD_INIT else {}
    num_classes = wanted.num_classes or RANDOM_CLASSES
    module = torchvision.models.get_model(wanted.name, weights=None, num_classes=num_classes, **extra)
    origin = f"{wanted.name}, weights from {wanted.weights}"
    if wanted.weights is None:
        origin = f"{wanted.name}, random weights from seed {seed} (model.weights=DEFAULT loads trained ones)"
    return Model(
        module=module,
        num_classes=num_classes,
        identity={"model.name": wanted.name},
        origin=origin,
        class_names=None,
        preset=None,
        weights=weights_name(wanted.weights),
    )


def _with_named_weights(wanted: ModelConfig, name: str) -> Model:
    import torchvision

    choices = torchvision.models.get_model_weights(wanted.name)
    known = ["DEFAULT", *(choice.name for choice in choices)]
    rule = f"null, {', '.join(known)} or a path to {'/'.join(CHECKPOINTS)}"
    require(name in known, "model.weights", rule, name, "Choose one of these.")
    chosen = choices[name]
    categories = tuple(chosen.meta["categories"])
    if wanted.num_classes not in (None, len(categories)):
        raise other_classes(chosen.name, len(categories), wanted.num_classes)
    # What torchvision itself passes to these builders along with trained weights.
    extra = {"transform_input": True, "init_weights": False} if wanted.name in OLD_INIT else {}
    return Model(
        module=torchvision.models.get_model(wanted.name, weights=None, num_classes=len(categories), **extra),
        num_classes=len(categories),
        identity={"model.name": wanted.name},
        origin=f"{wanted.name}, weights {chosen.name}",
        class_names=categories,
        preset=chosen.transforms(),
        weights=chosen.name,
        fetch_weights=partial(_fetch, wanted.name, name),
    )


def _fetch(model: str, name: str) -> State:
    """Get named weights from torch's cache or the network.

    Raises:
        UsageError: they are in neither.
    """
    import torchvision

    weights = torchvision.models.get_model_weights(model)[name]
    file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    try:
        if not file.exists():
            within(REACH_S, lambda: urlopen(weights.url, timeout=REACH_S).close())
            log.info("%s goes to %s", weights.url, file)
        state: State = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:
        raise UsageError(
            f"model.weights must be on this machine or reachable, got {name!r} ({in_one_line(error)}). Put"
            f" {weights.url} at {file}, give a checkpoint of yours (model.weights=FILE.pt), or set model.weights=null"
            " for random ones."
        ) from None
    return state
