"""timm's models: built by name without a network, with the transform that they were evaluated with."""

import math
from types import SimpleNamespace
from typing import Any

from torch import nn

from mgpu_ddp.config import ModelConfig, require
from mgpu_ddp.errors import UsageError


def build_timm(wanted: ModelConfig) -> tuple[nn.Module, Any]:
    """The module without its weights, and what `preprocess.from_weights` reads.

    Raises:
        UsageError: timm is not installed, has no such model, or has one whose transform is not supported.
    """
    try:
        import timm
        from timm.data import resolve_data_config
    except ImportError:
        raise UsageError("model must be one whose library is installed, got 'timm'. pip install 'timm>=1.0'.") from None
    # From its own list alone: timm takes names of hub repositories and of local folders too.
    name = wanted.name
    known = timm.is_model(name) and ":" not in name and "/" not in name
    require(known, "model.name", "a timm model", name, "timm.list_models() names them.")
    module: nn.Module = timm.create_model(name, pretrained=False, num_classes=wanted.num_classes)
    return module, _preset(resolve_data_config(model=module), name)


def _preset(data: dict[str, Any], name: str) -> Any:
    """timm's data config in the words of torchvision's presets, as `create_transform(is_training=False)` reads it."""
    from torchvision.transforms import InterpolationMode

    channels, height, width = data["input_size"]
    kind = f"{data['crop_mode']} crop of {channels}x{height}x{width}, {data['interpolation']}"
    supported = data["crop_mode"] == "center" and channels == 3 and height == width
    supported = supported and data["interpolation"] in ("nearest", "bilinear", "bicubic")
    rule = "one that crops the centre of a square RGB image"
    require(supported, "model.name", rule, f"{name} ({kind})", "Choose another model.")
    return SimpleNamespace(
        resize_size=[math.floor(height / data["crop_pct"])],
        crop_size=[height],
        interpolation=InterpolationMode(data["interpolation"]),
        mean=data["mean"],
        std=data["std"],
    )
