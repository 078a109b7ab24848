"""The head of a model: the layer that turns pooled features, the embedding, into logits."""

from torch import nn


def head_of(module: nn.Module, num_classes: int) -> nn.Linear | nn.Conv2d | None:
    """Find the head: the last linear layer of that width, or the last layer of all; None where there is no layer."""
    layers = [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    # Tracing may change the order of modules.
    fitting = [layer for layer in layers if isinstance(layer, nn.Linear) and layer.out_features == num_classes]
    return next(reversed(fitting or layers), None)


def embedding_dim(module: nn.Module, num_classes: int) -> int:
    """How many features the head sees; 0 without a head."""
    head = head_of(module, num_classes)
    if head is None:
        return 0
    return head.in_features if isinstance(head, nn.Linear) else head.in_channels
