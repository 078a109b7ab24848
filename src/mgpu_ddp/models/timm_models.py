"""timm's models: built by name without a network, with the transform that they were evaluated with."""

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from mgpu_ddp.config.checks import require
from mgpu_ddp.config.schema import Config, TimmConfig
from mgpu_ddp.config.script import CHECKPOINTS
from mgpu_ddp.errors import UsageError
from mgpu_ddp.models.checkpoint import in_one_line, is_checkpoint, read_state, weights_name
from mgpu_ddp.models.hub import WEIGHTS, Repository
from mgpu_ddp.models.model import RANDOM_CLASSES, Model, State, other_classes
from mgpu_ddp.models.names import way_from_timm
from mgpu_ddp.models.timm_hub import fetch_hosted


def build_timm(config: Config, wanted: TimmConfig, hosted: dict[str, Any] | None = None) -> Model:
    """Build the model that `wanted` names; `hosted` describes one of a repository, as `read_hosted` has it.

    Raises:
        UsageError: timm is not installed, has no such model or weights, or the model cannot do what is asked for.
    """
    pretrained = _look_up(wanted.name) if hosted is None else hosted
    weights, own = wanted.weights, pretrained.get("hf_hub_id")
    # A run folder names the repository.
    is_own = weights == "DEFAULT" or (weights is not None and weights == own)
    rule = f"null, DEFAULT or a path to {'/'.join(CHECKPOINTS)} for model=timm"
    remedy = "Name them by a tag of the model: model.name=resnet18.a1_in1k."
    require(weights is None or is_own or is_checkpoint(weights), "model.weights", rule, weights, remedy)
    if is_own:
        _check_hub_weights(wanted, pretrained)
        weights = own
    # Towers of SigLIP, and others for features, have none.
    num_classes = wanted.num_classes or (pretrained["num_classes"] if is_own else RANDOM_CLASSES)
    torch.manual_seed(config.seed)
    module, preset = _create(wanted.name, num_classes, hosted)
    head = module.get_classifier()
    # The embedding of a head of several layers is the input of none of them: the mean of two tokens, say.
    has_embedding = isinstance(head, nn.Linear | nn.Conv2d)
    rule = "without embedding for a model whose classifier is not one linear layer"
    found = f"{wanted.name} with {type(head).__name__}"
    is_wanted = "embedding" in config.output.computed and wanted.zero_shot is None
    require(has_embedding or not is_wanted, "output.fields", rule, found, "Leave it out.")
    source = f"random weights from seed {config.seed}" if weights is None else f"weights {weights}"
    fetch = partial(_fetch, str(own)) if hosted is None else partial(fetch_hosted, wanted)
    return Model(
        module=module,
        num_classes=num_classes or None,
        num_features=None if num_classes else module.head_hidden_size,
        has_embedding=has_embedding,
        identity={"model.name": f"timm/{wanted.name}"},
        origin=f"timm {wanted.name}, {source}",
        class_names=_class_names(pretrained) if is_own else None,
        preset=preset,
        weights=weights_name(weights),
        fetch_weights=fetch if is_own else None,
        # Many of timm's models take images of one size alone.
        input_size=preset.crop_size[0],
    )


def _require_known(name: str, shown: str) -> None:
    """Check a name against timm's own list, from which alone models are built: timm takes repositories and folders too.

    Raises:
        UsageError: timm is not installed, or has no such model.
    """
    try:
        import timm
    except ImportError:
        raise UsageError("model must be one whose library is installed, got 'timm'. pip install 'timm>=1.0'.") from None
    if not timm.is_model(name) or ":" in name or "/" in name:
        require(False, "model.name", "a timm model", shown, _way(name))


def _way(name: str) -> str:
    import timm

    return way_from_timm(name, timm.list_models(pretrained="." in name))


def _look_up(name: str) -> dict[str, Any]:
    """What timm knows of the weights that belong to a name of its list."""
    _require_known(name, name)
    import timm

    try:
        found = timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:  # of a tag that it does not know
        raise UsageError(
            f"model.name must be a timm model, got {name!r} ({str(error).rstrip('.')}). {_way(name)}"
        ) from None
    return dict(found.to_dict()) if found is not None else {}


def _create(name: str, num_classes: int, hosted: dict[str, Any] | None) -> tuple[Any, Any]:
    """The module without its weights, and its preset.

    Raises:
        UsageError: what its repository says makes no model.
    """
    if hosted is not None:
        _require_known(hosted["architecture"], f"{name} of the architecture {hosted['architecture']}")
    import timm
    from timm.data.config import resolve_data_config

    if hosted is None:
        module: Any = timm.create_model(name, pretrained=False, num_classes=num_classes)
        return module, _preset(resolve_data_config(model=module), name)
    architecture, settings = hosted["architecture"], hosted["settings"]
    try:
        module = timm.create_model(architecture, pretrained_cfg=settings, num_classes=num_classes, **hosted["args"])
    except Exception as error:  # models raise all kinds
        rule, remedy = "a repository of a model that this timm can build", "Correct its config.json, or upgrade timm."
        why = f"{name} ({architecture}: {in_one_line(error)})"
        raise UsageError(f"model.name must be {rule}, got {why}. {remedy}") from None
    return module, _preset(resolve_data_config(pretrained_cfg=settings), name)


def _check_hub_weights(wanted: TimmConfig, pretrained: dict[str, Any]) -> None:
    rule, remedy = "null or a checkpoint for this model", "timm names none on the Hugging Face hub."
    require(bool(pretrained.get("hf_hub_id")), "model.weights", rule, wanted.weights, remedy)
    classes = pretrained["num_classes"]
    rule = "a model whose own weights have classes"
    remedy = "Name classes for its features by model.zero_shot, or bring it by a script of yours (docs/own.md)."
    found = f"{wanted.name}, whose weights end in features"
    require(classes > 0 or wanted.zero_shot is not None, "model.name", rule, found, remedy)
    if wanted.num_classes not in (None, classes):
        raise other_classes(pretrained["hf_hub_id"], classes, wanted.num_classes)


def _fetch(repository: str) -> State:
    """Get a model's own weights from the cache of the Hugging Face hub or from the hub itself.

    Raises:
        UsageError: they are in neither.
    """
    found = Repository("model.weights", "DEFAULT", repository)
    path = found.get(WEIGHTS)
    if path is None:
        raise found.without_safetensors()
    return read_state(path)


def _class_names(pretrained: Any) -> tuple[str, ...] | None:
    """The names of the classes that the model was trained on, where its repository has them, or timm knows them."""
    if pretrained.get("names"):
        return tuple(pretrained["names"])
    # Others' models may have as many classes as ImageNet.
    if "names" in pretrained and not pretrained["hf_hub_id"].startswith("timm/"):
        return None
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
