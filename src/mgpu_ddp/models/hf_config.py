"""A repository's config.json, read as data: the one of transformers' own classes that it means, and its settings.

Nothing that a file says is imported or run: classes are those of the table below, settings those that a class knows.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn

from mgpu_ddp.distributed.host import require_memory
from mgpu_ddp.errors import OutOfMemoryError, UsageError
from mgpu_ddp.models.checkpoint import in_one_line

POOLED, CLS, PROJECTED = "pooler_output", "last_hidden_state", "image_embeds"
"""Outputs whose first token, or all of it, is an image's embedding."""
OF_CLASSIFIER = "ForImageClassification"
OF_TEACHER = "ForImageClassificationWithTeacher"
"""Two classifiers, whose logits are averaged."""
LARGEST = 1 << 14
"""No size of a real model is larger."""
MOST_LAYERS = 5_000
"""Layers of all kinds: the largest real models have a thousand."""
DEEPEST, LONGEST = 3, 256
"""How deep lists may nest, and how many values each may have."""


@dataclass(frozen=True, slots=True)
class Family:
    """Classes of transformers that begin with `prefix`, in one of its modules."""

    module: str
    prefix: str
    embedding: str | None = POOLED
    """None: it has no features of one width."""
    features: str = "Model"
    """The class without a classifier."""
    tower: str = ""
    """What its name has besides where it is the image tower of a model that takes texts as well."""


CLIP = Family("clip.{}_clip", "CLIP", PROJECTED, "VisionModelWithProjection", "Vision")
SIGLIP = Family("siglip.{}_siglip", "Siglip", POOLED, "VisionModel", "Vision")
FAMILIES = {
    "beit": Family("beit.{}_beit", "Beit"),
    "bit": Family("bit.{}_bit", "Bit"),
    "clip": CLIP,
    "clip_vision_model": CLIP,
    "convnext": Family("convnext.{}_convnext", "ConvNext"),
    "convnextv2": Family("convnextv2.{}_convnextv2", "ConvNextV2"),
    "cvt": Family("cvt.{}_cvt", "Cvt", None),
    "data2vec-vision": Family("data2vec.{}_data2vec_vision", "Data2VecVision", None),
    # The pooler of ViTs is not always trained, and many of its weights are without.
    "deit": Family("deit.{}_deit", "DeiT", CLS),
    "dinov2": Family("dinov2.{}_dinov2", "Dinov2"),
    "dinov2_with_registers": Family("dinov2_with_registers.{}_dinov2_with_registers", "Dinov2WithRegisters"),
    "dinov3_convnext": Family("dinov3_convnext.{}_dinov3_convnext", "DINOv3ConvNext"),
    "dinov3_vit": Family("dinov3_vit.{}_dinov3_vit", "DINOv3ViT"),
    "efficientnet": Family("efficientnet.{}_efficientnet", "EfficientNet"),
    "focalnet": Family("focalnet.{}_focalnet", "FocalNet"),
    "hiera": Family("hiera.{}_hiera", "Hiera"),
    "levit": Family("levit.{}_levit", "Levit"),
    "mobilenet_v1": Family("mobilenet_v1.{}_mobilenet_v1", "MobileNetV1"),
    "mobilenet_v2": Family("mobilenet_v2.{}_mobilenet_v2", "MobileNetV2"),
    "mobilevit": Family("mobilevit.{}_mobilevit", "MobileViT"),
    "mobilevitv2": Family("mobilevitv2.{}_mobilevitv2", "MobileViTV2"),
    "poolformer": Family("poolformer.{}_poolformer", "PoolFormer", None),
    "pvt": Family("pvt.{}_pvt", "Pvt", None),
    "pvt_v2": Family("pvt_v2.{}_pvt_v2", "PvtV2", None),
    "regnet": Family("regnet.{}_regnet", "RegNet"),
    "resnet": Family("resnet.{}_resnet", "ResNet"),
    "segformer": Family("segformer.{}_segformer", "Segformer", None),
    "siglip": SIGLIP,
    "siglip_vision_model": SIGLIP,
    "swiftformer": Family("swiftformer.{}_swiftformer", "SwiftFormer", None),
    "swin": Family("swin.{}_swin", "Swin"),
    "swinv2": Family("swinv2.{}_swinv2", "Swinv2"),
    "vit": Family("vit.{}_vit", "ViT", CLS),
    "vit_msn": Family("vit_msn.{}_vit_msn", "ViTMSN", CLS),
}
"""Families by the `model_type` of their config.json."""
ELSEWHERE = {
    "timm_wrapper": "It is timm's: model=timm model.name=hf_hub:{name}.",
    "siglip2": "Choose one of a fixed resolution, such as google/siglip2-base-patch16-224.",
}
"""Ways to models of other types."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A config.json of a model that there is a class for."""

    name: str
    """As the user gave it."""
    kind: str
    """Its `model_type`."""
    family: Family
    architecture: str
    """The class."""
    values: dict[str, Any]
    class_names: tuple[str, ...] | None
    """None where it does not classify."""
    is_composite: bool
    """The image tower has settings of its own, among those of the whole."""

    @property
    def output(self) -> str:
        """The field of what forward returns that becomes a column."""
        return str(self.family.embedding) if self.class_names is None else "logits"


def refused(name: str, rule: str, why: str, remedy: str) -> UsageError:
    """The line of a repository that is of no use."""
    return UsageError(f"model.name must be {rule}, got {name!r} ({why}). {remedy}")


def read_config(values: dict[str, Any], name: str) -> Found:
    """Find the class that a config.json means.

    Raises:
        UsageError: there is none, or the file asks for code of its own.
    """
    kind = values.get("model_type")
    rule, remedy = f"a model of type {', '.join(FAMILIES)}", "Bring it by a script of yours (docs/own.md)."
    if not isinstance(kind, str) or kind not in FAMILIES:
        remedy = ELSEWHERE.get(str(kind), remedy).format(name=name)
        raise refused(name, rule, f"its config.json says {str(kind)[:100]!r}", remedy)
    for key in ("auto_map", "quantization_config"):
        if values.get(key):
            raise refused(name, f"one without {key}", "its config.json has one", remedy)
    if values.get("problem_type") == "regression":
        raise refused(name, "a classifier, or a model that gives features", "its numbers are no logits", remedy)
    family, architectures = FAMILIES[kind], values.get("architectures")
    named = [each for each in architectures if isinstance(each, str)] if isinstance(architectures, list) else []
    head = next((head for head in (OF_TEACHER, OF_CLASSIFIER) if any(each.endswith(head) for each in named)), None)
    if head is None and family.embedding is None:
        raise refused(name, f"a classifier where it is of type {kind}", f"architectures={named}", remedy)
    return Found(
        name=name,
        kind=kind,
        family=family,
        architecture=f"{family.prefix}{head or family.features}",
        values=values,
        class_names=_class_names(values, name) if head else None,
        is_composite=bool(family.tower) and not kind.endswith("_vision_model"),
    )


def _class_names(values: dict[str, Any], name: str) -> tuple[str, ...]:
    """The names in `id2label`, in the order of classes."""
    # transformers leaves out what it takes for granted.
    labels = values.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
    count = len(labels) if isinstance(labels, dict) else 0
    if not count or set(labels) != set(map(str, range(count))):
        raise refused(name, "one whose id2label numbers its classes from 0", "its config.json does not", "Correct it.")
    names = (" ".join(str(labels[str(i)]).split()) for i in range(count))
    # A table cannot hold every text that JSON can spell.
    return tuple(each if each and each.isprintable() else f"class {i}" for i, each in enumerate(names))


def build_network(found: Found, available: int) -> nn.Module:
    """Build the module without its weights, where there is memory for them.

    Raises:
        UsageError: its class does not take these settings.
        OutOfMemoryError: it takes more than `available` bytes.
    """
    from transformers.initialization import no_init_weights

    try:
        with torch.device("meta"), _bounded():
            outline = _build(found)
        tensors = [*outline.parameters(), *outline.buffers()]
        num_bytes = sum(each.numel() * each.element_size() for each in tensors)
        require_memory("model.name", found.name, num_bytes, available, "Choose a smaller model.")
        # Each rank's will be replaced.
        with no_init_weights():
            return _build(found)
    except (OutOfMemoryError, UsageError):
        raise
    except Exception as error:  # transformers and torch raise all kinds
        rule = f"one whose config.json suits {found.architecture}"
        raise refused(found.name, rule, in_one_line(error), "Correct it.") from None


def _build(found: Found) -> nn.Module:
    family = found.family
    settings = settings_of(found)
    config = _config_class(found, family.tower)(**settings)
    names = found.class_names
    labels = {} if names is None else {"id2label": dict(enumerate(names)), "num_labels": len(names)}
    if family.tower and labels:
        config = _config_class(found)(vision_config=config, **labels)
    elif labels:
        config = _config_class(found)(**settings, **labels)
    network_class = getattr(import_module(_module(found, "modeling")), found.architecture)
    # Never what a file asks for, which may be a kernel to download.
    config._attn_implementation = "sdpa" if network_class._supports_sdpa else "eager"
    network: nn.Module = network_class(config)
    if found.output == CLS:
        network.pooler = None  # type: ignore[assignment]
    return network


def settings_of(found: Found) -> dict[str, Any]:
    """The values of fields that the class itself has, whatever else a file says; none that all classes have.

    Raises:
        ValueError: a value is none that such a field has.
    """
    from transformers import PreTrainedConfig

    common = {"num_labels", *(each.name for each in dataclasses.fields(PreTrainedConfig))}
    own = {each.name for each in dataclasses.fields(_config_class(found, found.family.tower))} - common
    values = found.values.get("vision_config") if found.is_composite else found.values
    if not isinstance(values, dict):
        raise ValueError("vision_config is no object")
    if found.is_composite and "projection_dim" in found.values:
        values = {**values, "projection_dim": found.values["projection_dim"]}
    settings = {key: value for key, value in values.items() if key in own and not key.startswith("_")}
    for key, value in settings.items():
        _check(key, value)
    return settings


def _config_class(found: Found, tower: str = "") -> Any:
    return getattr(import_module(_module(found, "configuration")), f"{found.family.prefix}{tower}Config")


def _module(found: Found, kind: str) -> str:
    return f"transformers.models.{found.family.module.format(kind)}"


def _check(key: str, value: Any, depth: int = 0) -> None:
    if isinstance(value, list):
        if depth == DEEPEST or len(value) > LONGEST:
            raise ValueError(f"{key} nests too deep, or is too long")
        for each in value:
            _check(key, each, depth + 1)
    elif isinstance(value, dict):
        raise ValueError(f"{key} is an object")
    elif isinstance(value, int | float) and not abs(value) <= LARGEST:
        raise ValueError(f"{key} is beyond {LARGEST}")


@contextmanager
def _bounded() -> Iterator[None]:
    """Stop a module whose layers go on and on while it is built."""
    from torch.nn.modules import module as modules

    layers = 0

    def count(*_: Any) -> None:
        nonlocal layers
        layers += 1
        if layers > MOST_LAYERS:
            raise ValueError(f"more than {MOST_LAYERS:,} layers")

    handle = modules.register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
