"""Makes a model ready to predict: shared by rank 0, folded, fused, moved to its device, compiled."""

import copy
import itertools

import torch
from torch import nn

from mgpu_ddp.config.resolved import Resolved
from mgpu_ddp.config.schema import Config, RuntimeConfig
from mgpu_ddp.distributed.world import World, share_weights
from mgpu_ddp.models.compile_cache import remove_truncated_libraries
from mgpu_ddp.models.fusion import FUSED, fold_batch_norms, fuse_activations
from mgpu_ddp.models.head import embedding_dim, head_of
from mgpu_ddp.models.model import Model

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def precision_of(config: RuntimeConfig, device: torch.device) -> str:
    """`runtime.precision` with auto decided: fp32 on the CPU, fp16 on CUDA."""
    return ("fp16" if device.type == "cuda" else "fp32") if config.precision == "auto" else config.precision


def prepare(model: Model, config: Config, resolved: Resolved, world: World, *, keep: bool = False) -> nn.Module:
    """Share, fold, move and compile the module. Collective: every rank calls this.

    Returns a module that maps (batch_size, 3, height, width) on `world.device` to logits (batch_size, classes). With
    `keep` it is a copy, and the model can be prepared again.
    """
    with world.together("prepare the model"):
        module = model.module.eval().requires_grad_(False)
        share_weights(module, world)
        return _place(copy.deepcopy(module) if keep else module, config, resolved, world.device)


def _place(module: nn.Module, config: Config, resolved: Resolved, device: torch.device) -> nn.Module:
    if config.runtime.fold:
        module = _fold(module, config, resolved, device)
    if device.type == "cuda" and resolved.compile != "on" and config.strategy == "ddp":
        from mgpu_ddp.models.max_pool_kernel import replace_max_pools

        replace_max_pools(module)
    _set_backends(resolved.precision, deterministic=config.runtime.deterministic)
    layout = torch.channels_last if config.runtime.channels_last else torch.contiguous_format
    module = module.to(device=device, dtype=DTYPES[resolved.precision])
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


def _fold(module: nn.Module, config: Config, resolved: Resolved, device: torch.device) -> nn.Module:
    """Fold batch norms, and fuse activations where cuDNN can and may."""
    classes, runtime = config.model.num_classes, config.runtime
    folded = fold_batch_norms(module)
    # Tracing may dissolve the head, and embeddings are its input.
    if embedding_dim(folded, classes) == embedding_dim(module, classes):
        module = folded
    if (
        device.type == "cuda"
        and resolved.precision in ("fp16", "bf16")
        and runtime.channels_last
        and (config.model.name.startswith(FUSED) or not runtime.deterministic)
    ):
        module = fuse_activations(module, head_of(module, classes))
    return module


def _set_backends(precision: str, *, deterministic: bool) -> None:
    """Set how this process computes; always, because one process may run jobs of several precisions."""
    # Where cuDNN chooses kernels by timing them, bitwise equality between processes is gone.
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
