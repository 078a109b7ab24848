"""Finds the named model that a checkpoint fits, for the message that it does not fit another."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import torch
from torch import nn

from mgpu_ddp.models.checkpoint import Checkpoint
from mgpu_ddp.models.model import RANDOM_CLASSES, Model

SEARCH_S = 8.0
"""CPU time of a search."""
HINTED, TIMM = "hinted", "timm"
MANY_OF_TIMM = (
    *("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224"),
    *("vit_base_patch32_224", "convnext_tiny", "convnext_small", "convnext_base", "convnextv2_tiny"),
    *("efficientnet_b0", "efficientnet_b3", "tf_efficientnetv2_s", "mobilenetv3_large_100", "mobilenetv4_conv_small"),
    *("swin_tiny_patch4_window7_224", "swin_base_patch4_window7_224", "resnet50d", "regnety_016"),
)
"""Models of timm that checkpoints are often of, and that torchvision has not, or not by these keys."""


Matches = Callable[[Model, Checkpoint], bool]


def identify(checkpoint: Checkpoint, fits: Matches, resembles: Matches) -> str | None:
    """The keys that choose a model that fits; None where none is found in a while.

    Those that the file's name or a text in it names come first, then torchvision's, then some of timm's. A family
    of torchvision's is passed over where its first model does not resemble the checkpoint's.
    """
    families: dict[str, bool] = {}
    deadline = time.process_time() + SEARCH_S
    for name, family in _candidates(checkpoint):
        # Not every model can be built without memory for its weights.
        with suppress(Exception):
            if families.get(family, True) and time.process_time() < deadline:
                model = _outline(name, is_timms=family == TIMM)
                if fits(model, checkpoint):
                    return f"model=timm model.name={name}" if family == TIMM else f"model.name={name}"
                if family not in (TIMM, HINTED, *families):
                    families[family] = resembles(model, checkpoint)
    return None


def _candidates(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Names, each with its family."""
    import torchvision

    texts = [checkpoint.path.name, *checkpoint.words]
    words = dict.fromkeys(word for text in texts for word in re.findall(r"\w+", text.lower()))
    names = torchvision.models.list_models(module=torchvision.models)
    by_hint = [name for name in names if any(name in word for word in words)]
    yield from ((name, HINTED) for name in sorted(by_hint, key=len, reverse=True))
    try:
        from timm import is_model
    except ImportError:

        def is_model(model_name: str) -> bool:
            return False

    yield from ((word, TIMM) for word in words if is_model(word))
    yield from ((name, torchvision.models.get_model_builder(name).__module__) for name in names)
    yield from ((name, TIMM) for name in MANY_OF_TIMM if is_model(name))


def _outline(name: str, *, is_timms: bool) -> Model:
    """A model without memory for its weights."""
    with torch.device("meta"):
        if is_timms:
            import timm

            module: nn.Module = timm.create_model(name, num_classes=RANDOM_CLASSES)
        else:
            import torchvision

            extra = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
            module = torchvision.models.get_model(name, weights=None, num_classes=RANDOM_CLASSES, **extra)
    return Model(module=module, num_classes=RANDOM_CLASSES, identity={}, origin="", class_names=None, preset=None)
