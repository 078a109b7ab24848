"""timm's models: built by name without a network, with the transform that they were evaluated with."""

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from mgpu_ddp.config.checks import require
from mgpu_ddp.config.schema import Config, TimmConfig
from mgpu_ddp.errors import UsageError
from mgpu_ddp.models.model import Model, State, did_you_mean
from mgpu_ddp.models.weights import CHECKPOINTS, read_checkpoint

HUB_FILE = "model.safetensors"
"""The weights in a model's repository on the Hugging Face hub: tensors alone, no code."""


def build_timm(config: Config, wanted: TimmConfig) -> Model:
    """Build the model that `wanted` names.

    Raises:
        UsageError: timm is not installed, has no such model or weights, or the model cannot do what is asked for.
    """
    weights = wanted.weights
    rule = f"null, DEFAULT or a path to {'/'.join(CHECKPOINTS)} for model=timm"
    is_known = weights is None or weights == "DEFAULT" or weights.endswith(CHECKPOINTS)
    remedy = "Name them by a tag of the model: model.name=resnet18.a1_in1k."
    require(is_known, "model.weights", rule, weights, remedy)
    torch.manual_seed(config.seed)
    module, preset = _create(wanted)
    if weights == "DEFAULT":
        _check_hub_weights(wanted, module.pretrained_cfg)
    if "embedding" in config.output.computed:
        _check_embedding(wanted, module)
    source = f"random weights from seed {config.seed}" if weights is None else f"weights {weights}"
    return Model(
        module=module,
        num_classes=wanted.num_classes,
        identity={"model.name": f"timm/{wanted.name}"},
        origin=f"timm {wanted.name}, {source}",
        class_names=_class_names(module.pretrained_cfg) if weights == "DEFAULT" else None,
        preset=preset,
        fetch_weights=partial(_download, module.pretrained_cfg["hf_hub_id"]) if weights == "DEFAULT" else None,
        # Many of timm's models take images of one size alone.
        input_size=preset.crop_size[0],
    )


def _create(wanted: TimmConfig) -> tuple[Any, Any]:
    """The module without its weights, and its preset."""
    try:
        import timm
        from timm.data.config import resolve_data_config
    except ImportError:
        raise UsageError("model must be one whose library is installed, got 'timm'. pip install 'timm>=1.0'.") from None
    # From its own list alone: timm takes names of hub repositories and of local folders too.
    name = wanted.name
    known = timm.is_model(name) and ":" not in name and "/" not in name
    names = timm.list_models(pretrained="." in name)
    remedy = did_you_mean(name.partition("/")[2] or name, names, "timm.list_models() names them.")
    require(known, "model.name", "a timm model", name, remedy)
    try:
        module: Any = timm.create_model(name, pretrained=False, num_classes=wanted.num_classes)
    except RuntimeError as error:  # of a tag that it does not know
        raise UsageError(
            f"model.name must be a timm model, got {name!r} ({str(error).rstrip('.')}). {remedy}"
        ) from None
    return module, _preset(resolve_data_config(model=module), name)


def _check_hub_weights(wanted: TimmConfig, pretrained: Any) -> None:
    rule, remedy = "null or a checkpoint for this model", "timm names none on the Hugging Face hub."
    require(bool(pretrained.get("hf_hub_id")), "model.weights", rule, "DEFAULT", remedy)
    classes = pretrained["num_classes"]
    rule, remedy = f"{classes} for these weights", f"Set model.num_classes={classes}."
    require(wanted.num_classes == classes, "model.num_classes", rule, wanted.num_classes, remedy)


def _check_embedding(wanted: TimmConfig, module: Any) -> None:
    # The embedding of a head of several layers is the input of none of them: the mean of two tokens, say.
    head = module.get_classifier()
    rule = "without embedding for a model whose classifier is not one linear layer"
    found = f"{wanted.name} with {type(head).__name__}"
    require(isinstance(head, nn.Linear | nn.Conv2d), "output.fields", rule, found, "Leave it out.")


def _download(repository: str) -> State:
    """Get a model's own weights from the cache of the Hugging Face hub or from the hub itself.

    Raises:
        UsageError: they are in neither.
    """
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(repository, HUB_FILE))
    except Exception as error:  # the hub's own, those of its HTTP client, and OSError
        raise UsageError(
            f"model.weights must be on this machine or reachable, got 'DEFAULT' ({type(error).__name__} for"
            f" {repository} of the Hugging Face hub). Fetch {HUB_FILE} where there is a network, and give its path."
        ) from None
    return read_checkpoint(path)


def _class_names(pretrained: Any) -> tuple[str, ...] | None:
    """The names of the classes that the model was trained on, where timm knows them."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(pretrained)
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(i) for i in range(info.num_classes()))


def _preset(data: dict[str, Any], name: str) -> Any:
    """timm's data config in the words of torchvision's presets, as `create_transform(is_training=False)` reads it."""
    from torchvision.transforms import InterpolationMode

    channels, height, width = data["input_size"]
    kind = f"{data['crop_mode']} crop of {channels}x{height}x{width}, {data['interpolation']}"
    squashes = data["crop_mode"] == "squash"
    supported = (squashes or data["crop_mode"] == "center") and channels == 3 and height == width
    supported = supported and data["interpolation"] in ("nearest", "bilinear", "bicubic")
    rule = "one that crops the centre of a square RGB image, or squashes the image to one"
    require(supported, "model.name", rule, f"{name} ({kind})", "Choose another model.")
    resized = math.floor(height / data["crop_pct"])
    return SimpleNamespace(
        resize_size=[resized, resized] if squashes else [resized],
        crop_size=[height],
        interpolation=InterpolationMode(data["interpolation"]),
        mean=data["mean"],
        std=data["std"],
    )
