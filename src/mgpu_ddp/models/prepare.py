"""Makes a model ready to predict: shared by rank 0, folded, fused, moved to its device, compiled."""

import copy
import itertools

import torch
from torch import nn

from mgpu_ddp.config.resolved import Resolved, Speedups
from mgpu_ddp.config.schema import Config, RuntimeConfig
from mgpu_ddp.distributed.world import World, share_weights
from mgpu_ddp.models.compile_cache import remove_truncated_libraries
from mgpu_ddp.models.fusion import FUSED, fold_batch_norms, fuse_activations
from mgpu_ddp.models.head import embedding_dim, head_of
from mgpu_ddp.models.model import Model
from mgpu_ddp.models.zero_shot import ZeroShotClassifier

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def precision_of(config: RuntimeConfig, device: torch.device) -> str:
    """`runtime.precision` with auto decided: fp32 on the CPU, fp16 on CUDA."""
    return ("fp16" if device.type == "cuda" else "fp32") if config.precision == "auto" else config.precision


def input_dtype(resolved: Resolved) -> torch.dtype:
    """The dtype of model input."""
    return torch.float32 if resolved.speedups.autocast else DTYPES[resolved.precision]


def prepare(model: Model, config: Config, resolved: Resolved, world: World, *, keep: bool = False) -> nn.Module:
    """Share, fold, move and compile the module. Collective: every rank calls this.

    Returns a module that maps model input of `batch_size` samples on `world.device` to what forward returns. With
    `keep` it is a copy, and the model can be prepared again.
    """
    with world.together("prepare the model"):
        module = model.module.eval().requires_grad_(False)
        share_weights(module, world)
        module = copy_of(module) if keep else module
        return place(module, config, resolved, world.device, model.num_classes)


def has_hooks(module: nn.Module) -> bool:
    """True where hooks run with forward: what they keep, and where, nobody knows."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def copy_of(module: nn.Module) -> nn.Module:
    """A copy that shares nothing, or the module itself where it cannot be copied, or a hook would write to it."""
    if has_hooks(module):
        return module
    try:
        return copy.deepcopy(module)
    except Exception:
        return module


def place(
    module: nn.Module, config: Config, resolved: Resolved, device: torch.device, num_classes: int | None
) -> nn.Module:
    """Fold and fuse as far as was resolved, move to the device, and compile where asked for."""
    if resolved.speedups.fold:
        module = _fold(module, config, resolved, device, num_classes)
    if device.type == "cuda" and resolved.compile != "on" and config.strategy == "ddp":
        from mgpu_ddp.models.max_pool_kernel import replace_max_pools

        replace_max_pools(module)
    set_backends(resolved.precision, deterministic=config.runtime.deterministic)
    layout = torch.channels_last if config.runtime.channels_last else torch.contiguous_format
    module = module.to(device=device, dtype=input_dtype(resolved))
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        # A tensor of more dimensions (a constant that tracing has found) has no such layout.
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=layout)
    if config.strategy == "data_parallel":
        module = nn.DataParallel(module)
    if resolved.compile == "on":
        remove_truncated_libraries()
        # Each shape is a graph of its own, and a sweep brings many. Beyond the limit torch would not compile.
        torch._dynamo.config.recompile_limit = 64
        # Otherwise each process times kernels that add up in other orders, and takes the fastest.
        torch._inductor.config.deterministic = config.runtime.deterministic
        module = torch.compile(module, dynamic=False)  # type: ignore[assignment]
    return module


def speedups_of(config: Config) -> Speedups:
    """How a named model is made faster: what tests hold to be safe for its family."""
    runtime = config.runtime
    may_fuse = config.model.name.startswith(FUSED) or not runtime.deterministic
    return Speedups(fold=runtime.fold, fuse=runtime.fold and may_fuse)


def _fold(
    module: nn.Module, config: Config, resolved: Resolved, device: torch.device, num_classes: int | None
) -> nn.Module:
    """Fold batch norms, and fuse activations where cuDNN can and may."""
    if isinstance(module, ZeroShotClassifier):
        module.tower = _fold(module.tower, config, resolved, device, None)
        return module
    folded = fold_batch_norms(module)
    # Tracing may dissolve the head, and embeddings are its input.
    if num_classes is None or embedding_dim(folded, num_classes) == embedding_dim(module, num_classes):
        module = folded
    can_fuse = device.type == "cuda" and resolved.precision in ("fp16", "bf16") and config.runtime.channels_last
    if resolved.speedups.fuse and can_fuse:
        head = head_of(module, num_classes) if num_classes is not None else None
        module = fuse_activations(module, head)
    return module


def set_backends(precision: str, *, deterministic: bool) -> None:
    """Set how this process computes; always, because one process may run jobs of several precisions."""
    # Where cuDNN chooses kernels by timing them, bitwise equality between processes is gone.
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
