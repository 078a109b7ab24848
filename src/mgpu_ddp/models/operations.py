"""Counts the work of a model's forward pass."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mgpu_ddp.preprocess.transform import AnyTransform, Transform


def operations(module: nn.Module, transform: AnyTransform) -> int:
    """Floating-point operations of one image's forward pass, in convolutions and matrix products.

    A multiplication and the addition after it are two. Attention that torch has fused is left out.
    """
    # Imports Triton, for which jobs on GPUs need not wait here.
    from torch.utils.flop_counter import flop_registry

    shape = (3, *transform.out_size) if isinstance(transform, Transform) else transform.shape
    with _Operations(flop_registry) as counted, torch.no_grad():
        module.eval()(torch.zeros(1, *shape))
    return int(counted.total)


class _Operations(TorchDispatchMode):
    """Adds up the floating-point operations of what runs under it, by torch's formulas.

    torch's own FlopCounterMode does the same, and imports torch._dynamo for it.
    """

    def __init__(self, formulas: Mapping[Any, Callable[..., int]]) -> None:
        super().__init__()
        self.total, self._formulas = 0, formulas

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # To be skipped it would have to be imported.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = self._formulas.get(func.overloadpacket)
        self.total += formula(*args, **(kwargs or {}), out_val=out) if formula else 0
        return out
