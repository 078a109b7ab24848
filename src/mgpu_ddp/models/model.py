"""A model before it runs, as every family of models hands it over."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mgpu_ddp.errors import UsageError

State = dict[str, torch.Tensor]
"""A state dict."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A module with what is known about it before it runs."""

    module: nn.Module
    """On the CPU; random until `load_weights` fills it."""
    num_classes: int | None
    """Width of the logits; None where forward returns features or other columns, or is yet to be tried."""
    num_features: int | None = None
    """Width of what forward returns, where that are features for `model.zero_shot`."""
    has_embedding: bool = True
    """Its classifier is one linear layer, whose input is the embedding."""
    identity: dict[str, Any]
    """Tells it from other models in the manifest, its weights and classes apart."""
    origin: str
    """Where the weights come from, for the log."""
    class_names: tuple[str, ...] | None
    preset: Any
    """The transform that the model was evaluated with, in the words of torchvision's presets; None if unknown."""
    weights: str | None = None
    """As `Resolved` has them."""
    fetch_weights: Callable[[], State] | None = None
    """Gets the weights that `model.weights` names; None where it is null or a path."""
    input_size: int | None = None
    """Side of the images that it takes, in pixels, where it may take no others."""
    outputs: Callable[[Any], Any] | None = None
    """Applied to what forward returns."""
    is_tried: bool = False
    """Its columns, and how it may be made faster, are found by trying it: nothing else is known of its forward."""


RANDOM_CLASSES = 1000
"""Number of classes of a model without weights that say theirs."""


def other_classes(weights: str, num_classes: int, wanted: int | None) -> UsageError:
    """The error of another number of classes than named weights have."""
    return UsageError(
        f"model.num_classes must be {num_classes} for the weights {weights}, got {wanted}. Give a checkpoint of"
        f" {wanted} classes (model.weights=FILE.pt), leave model.num_classes out, or set model.weights=null for random"
        " ones."
    )
