"""timm's models: built by name without a network, with the transform that they were evaluated with."""

import difflib
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from mgpu_ddp.config.checks import require
from mgpu_ddp.config.schema import ModelConfig
from mgpu_ddp.errors import UsageError

WEIGHTS = "model.safetensors"
NONE = "timm names none on the Hugging Face hub."


def build_timm(wanted: ModelConfig) -> tuple[nn.Module, Any]:
    """The module without its weights, and what `preprocess.from_weights` reads.

    Raises:
        UsageError: timm is not installed, has no such model, or has one whose transform is not supported.
    """
    try:
        import timm
        from timm.data.config import resolve_data_config
    except ImportError:
        raise UsageError("model must be one whose library is installed, got 'timm'. pip install 'timm>=1.0'.") from None
    # From its own list alone: timm takes names of hub repositories and of local folders too.
    name = wanted.name
    known = timm.is_model(name) and ":" not in name and "/" not in name
    near = difflib.get_close_matches(name.partition("/")[2] or name, timm.list_models(pretrained="." in name), n=1)
    remedy = f"Did you mean {near[0]}?" if near else "timm.list_models() names them."
    require(known, "model.name", "a timm model", name, remedy)
    try:
        module: Any = timm.create_model(name, pretrained=False, num_classes=wanted.num_classes)
    except RuntimeError as error:  # of a tag that it does not know
        raise UsageError(
            f"model.name must be a timm model, got {name!r} ({str(error).rstrip('.')}). {remedy}"
        ) from None
    if wanted.weights == "DEFAULT":
        config = module.pretrained_cfg
        require(bool(config.get("hf_hub_id")), "model.weights", "null or a checkpoint for this model", "DEFAULT", NONE)
        classes, remedy = config["num_classes"], f"Set model.num_classes={config['num_classes']}."
        fits = wanted.num_classes == classes
        require(fits, "model.num_classes", f"{classes} for these weights", wanted.num_classes, remedy)
    return module, _preset(resolve_data_config(model=module), name)


def download_timm(wanted: ModelConfig, module: Any) -> Path:
    """The model's own weights, from the cache of the Hugging Face hub or from the hub itself: tensors alone.

    Raises:
        UsageError: they are in neither.
    """
    from huggingface_hub import hf_hub_download

    source = module.pretrained_cfg["hf_hub_id"]
    try:
        return Path(hf_hub_download(source, WEIGHTS))
    except Exception as error:  # the hub's own, those of its HTTP client, and OSError
        raise UsageError(
            f"model.weights must be on this machine or reachable, got 'DEFAULT' ({type(error).__name__} for {source} of"
            f" the Hugging Face hub). Fetch {WEIGHTS} where there is a network, and give its path."
        ) from None


def class_names_of(module: Any) -> tuple[str, ...] | None:
    """The names of the classes that the model was trained on, where timm knows them."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(module.pretrained_cfg)
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
