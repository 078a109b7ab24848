"""Names → modules that are ready to predict: built, loaded, shared by rank 0, folded, on their device."""

import argparse
import copy
import difflib
import hashlib
import itertools
import logging
import pickle
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mgpu_ddp import preprocess
from mgpu_ddp.arrays import open_array
from mgpu_ddp.classes import read_class_names
from mgpu_ddp.config import ArrayConfig, Config, ModelConfig, RuntimeConfig, TimmConfig, require
from mgpu_ddp.errors import UsageError
from mgpu_ddp.folding import fold_batch_norms, fuse_activations
from mgpu_ddp.preprocess import Transform
from mgpu_ddp.timms import build_timm, class_names_of, download_timm
from mgpu_ddp.world import World, share_weights

log = logging.getLogger("mgpu_ddp")

CHECKPOINTS = (".pt", ".pth", ".safetensors")
PREFIXES = ("module.", "_orig_mod.", "resnet.")
"""What DataParallel and DDP, torch.compile and the tutorial's SimpleModel put before every key."""
NESTS = ("state_dict", "model_state_dict", "model")
OTHERS = ("state_dict_ema", "model_ema")
"""What training scripts may keep beside these."""
OLD_INIT = ("googlenet", "inception_v3")
"""Builders that warn unless they are told how to initialise."""
STANDARD_SIZE = 224
"""Stands for a model's own size."""
FUSED = ("resnet", "resnext", "densenet")
"""Models whose rows keep their bits when cuDNN fuses, wherever they stand in a batch, as `tests/gpu` checks in half
precision. Others (vgg, squeezenet), and fp32, do not."""
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A module with what is known about it before it runs."""

    module: nn.Module
    num_classes: int
    origin: str
    """Where the weights come from, for the log."""
    class_names: tuple[str, ...] | None
    preset: Any
    """The transform of named weights, or None."""


def load_model(config: Config, world: World) -> Model:
    """Build the model on every rank, and fill it on rank 0 alone. Collective: every rank calls this.

    Raises:
        UsageError: no such model or weights, or weights that do not fit.
    """
    with world.together("load the model"):
        model = build_model(config)
        if world.rank == 0:
            load_weights(model, config.model)
            if config.model.class_names is not None:
                names = read_class_names(Path(config.model.class_names), model.num_classes)
                model = replace(model, class_names=names)
    if config.model.class_names is not None:
        model = replace(model, class_names=tuple(world.share("class names", model.class_names)))
    return model


def build_model(config: Config) -> Model:
    """Build the model on the CPU, without its weights."""
    import torchvision

    wanted: ModelConfig = config.model
    if isinstance(wanted, TimmConfig):
        return _build_timm(config, wanted)
    names = torchvision.models.list_models(module=torchvision.models)
    require(
        wanted.name in names,
        "model.name",
        "a torchvision classification model",
        wanted.name,
        _similar(wanted.name, names),
    )
    weights = wanted.weights
    torch.manual_seed(config.seed)
    if weights is None or weights.endswith(CHECKPOINTS):
        extra = {"init_weights": True} if wanted.name in OLD_INIT else {}
        module = torchvision.models.get_model(wanted.name, weights=None, num_classes=wanted.num_classes, **extra)
        random = f"random weights from seed {config.seed} (model.weights=DEFAULT loads trained ones)"
        origin = f"{wanted.name}, {random if weights is None else f'weights from {weights}'}"
        return Model(module=module, num_classes=wanted.num_classes, origin=origin, class_names=None, preset=None)
    choices = torchvision.models.get_model_weights(wanted.name)
    known = ["DEFAULT", *(choice.name for choice in choices)]
    rule = f"null, {', '.join(known)} or a path to {'/'.join(CHECKPOINTS)}"
    require(weights in known, "model.weights", rule, weights, "Choose one of these.")
    chosen = choices[weights]
    categories = tuple(chosen.meta["categories"])
    require(
        wanted.num_classes == len(categories),
        "model.num_classes",
        f"{len(categories)} for these weights",
        wanted.num_classes,
        "Leave model.num_classes out.",
    )
    # What torchvision itself passes to these builders along with trained weights.
    trained = {"transform_input": True, "init_weights": False} if wanted.name in OLD_INIT else {}
    module = torchvision.models.get_model(wanted.name, weights=None, num_classes=len(categories), **trained)
    return Model(
        module=module,
        num_classes=len(categories),
        origin=f"{wanted.name}, weights {chosen.name}",
        class_names=categories,
        preset=chosen.transforms(),
    )


def _build_timm(config: Config, wanted: TimmConfig) -> Model:
    weights = wanted.weights
    rule = f"null, DEFAULT or a path to {'/'.join(CHECKPOINTS)} for model=timm"
    fits = weights in (None, "DEFAULT") or str(weights).endswith(CHECKPOINTS)
    require(fits, "model.weights", rule, weights, "A timm model's name may end in a tag: model.name=resnet18.a1_in1k.")
    torch.manual_seed(config.seed)
    module, preset = build_timm(wanted)
    if "embedding" in config.output.computed:
        # What a head of several layers is given is none of their inputs alone: the mean of two tokens, say.
        head = module.get_classifier()  # type: ignore[operator]
        has_one = isinstance(head, nn.Linear | nn.Conv2d)
        rule = "without embedding for a model whose classifier is not one linear layer"
        require(has_one, "output.fields", rule, f"{wanted.name} with {type(head).__name__}", "Leave it out.")
    source = f"random weights from seed {config.seed}" if weights is None else f"weights {weights}"
    return Model(
        module=module,
        num_classes=wanted.num_classes,
        origin=f"timm {wanted.name}, {source}",
        class_names=class_names_of(module) if weights == "DEFAULT" else None,
        preset=preset,
    )


def _similar(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"Did you mean {near[0]}?" if near else "torchvision.models.list_models() names them."


def load_weights(model: Model, config: ModelConfig) -> None:
    """Fill the module from the named weights or the checkpoint, if there are any. Rank 0 only: DDP shares them.

    Raises:
        UsageError: a file is missing, hostile or does not fit; names the keys.
    """
    if config.weights is None:
        return
    if config.weights.endswith(CHECKPOINTS):
        state = _strip(_read_checkpoint(Path(config.weights)))
    elif isinstance(config, TimmConfig):
        state = _read_checkpoint(download_timm(config, model.module))
    else:
        state = _named_state(config)
    expected = {key: tuple(value.shape) for key, value in model.module.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in state.items()}
    problems = [
        f"{word} {len(keys)} keys ({', '.join(sorted(keys)[:4])}{', ...' if len(keys) > 4 else ''})"
        for word, keys in (
            ("missing", [k for k in expected if k not in given and not k.endswith("num_batches_tracked")]),
            ("unexpected", [k for k in given if k not in expected]),
            (
                "misshapen",
                [f"{k} {given[k]} for {expected[k]}" for k in given if k in expected and given[k] != expected[k]],
            ),
        )
        if keys
    ]
    if problems:
        raise UsageError(
            f"model.weights must fit {config.name} with {model.num_classes} classes, got {config.weights!r}:"
            f" {'; '.join(problems)}. Set model.name and model.num_classes to the checkpoint's."
        )
    model.module.load_state_dict(state, strict=False)


def _named_state(config: ModelConfig) -> dict[str, torch.Tensor]:
    import torchvision

    weights = torchvision.models.get_model_weights(config.name)[config.weights]
    try:
        state: dict[str, torch.Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:
        file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
        raise UsageError(
            f"model.weights must be on this machine or reachable, got {config.weights!r} ({_first(error)}). Put"
            f" {weights.url.rpartition('/')[2]} at {file}, or give a checkpoint path."
        ) from None
    return state


def _first(error: Exception) -> str:
    """The gist of an error that tells a long story."""
    if isinstance(error, pickle.UnpicklingError):
        return "it holds objects that only code can load"
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return f"{type(error).__name__}: {' '.join(text.split())[:200]}"


def _read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    require(path.is_file(), "model.weights", "an existing file", str(path), "Check the path.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        # weights_only: a pickle that wants to run code is refused. Many training scripts save their command line too.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        is_foreign = isinstance(error, pickle.UnpicklingError)
        remedy = "Save module.state_dict()." if is_foreign else "It may be damaged: copy it again."
        raise UsageError(
            f"model.weights must be a checkpoint of tensors alone, got {str(path)!r} ({_first(error)}). {remedy}"
        ) from None
    for name in (name for name in OTHERS if isinstance(loaded, dict) and name in loaded):
        log.info("model.weights=%s: took the trained weights, not %s, which it has too", path, name)
    for nest in NESTS:
        if isinstance(loaded, dict) and isinstance(loaded.get(nest), dict):
            loaded = loaded[nest]
    ok = isinstance(loaded, dict) and all(isinstance(value, torch.Tensor) for value in loaded.values())
    require(ok, "model.weights", "a state dict", str(path), "Save module.state_dict().")
    return dict(loaded)


def _strip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove wrapper prefixes that stand before every key."""
    while state and (prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in state)), None)):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def weights_digest(module: nn.Module) -> str:
    """sha256 over every parameter and buffer, in the order of the state dict."""
    digest = hashlib.sha256()
    for key, value in module.state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def precision_of(config: RuntimeConfig, device: torch.device) -> str:
    """`runtime.precision` with auto decided: fp32 on the CPU, fp16 on CUDA."""
    return ("fp16" if device.type == "cuda" else "fp32") if config.precision == "auto" else config.precision


def choose_transform(config: Config, model: Model) -> Transform:
    """`transform` with auto decided: see `TransformConfig`."""
    name, size = config.transform.name, config.transform.size
    transform = preprocess.imagenet(size)
    if name == "plain" or (name == "auto" and config.data.name == "fake"):
        # Many of timm's models take images of one size alone.
        fixed = isinstance(config.model, TimmConfig) and size == STANDARD_SIZE
        return preprocess.plain(model.preset.crop_size[0] if fixed else size)
    if name == "auto" and model.preset is not None:
        transform = preprocess.from_weights(model.preset, size)
    if name == "auto" and isinstance(config.data, ArrayConfig):
        height, width = open_array(config.data.path).shape[1:3]
        if (height, width) == transform.out_size:
            return replace(transform, resize=transform.out_size, crop=None)
    return transform


def prepare(model: Model, config: Config, world: World, *, keep: bool = False) -> nn.Module:
    """Share, fold, move and compile the module. Collective: every rank calls this.

    Returns a module that maps (batch_size, 3, height, width) on `world.device` to logits (batch_size, classes). With
    `keep` it is a copy, and the model can be prepared again.
    """
    with world.together("prepare the model"):
        module = share_weights(model.module.eval())
        return _place(copy.deepcopy(module) if keep else module, config, world.device)


def _place(module: nn.Module, config: Config, device: torch.device) -> nn.Module:
    precision = precision_of(config.runtime, device)
    if config.runtime.fold:
        folded, classes = fold_batch_norms(module), config.model.num_classes
        # Tracing may dissolve the head, and embeddings are what goes into it.
        if embedding_dim(folded, classes) == embedding_dim(module, classes):
            module = folded
        if (
            device.type == "cuda"
            and precision in ("fp16", "bf16")
            and config.runtime.channels_last
            and (config.model.name.startswith(FUSED) or not config.runtime.deterministic)
        ):
            module = fuse_activations(module, head_of(module, config.model.num_classes))
    if device.type == "cuda" and config.runtime.compile != "on" and config.strategy == "ddp":
        from mgpu_ddp.pooling import replace_max_pools

        replace_max_pools(module)
    # One process may run jobs of several precisions: set both ways. Where cuDNN chooses kernels by timing them,
    # bitwise equality between processes is gone.
    torch.backends.cudnn.benchmark = not config.runtime.deterministic
    torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    layout = torch.channels_last if config.runtime.channels_last else torch.contiguous_format
    module = module.to(device=device, dtype=DTYPES[precision])
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        # What has more dimensions (a constant that tracing has found) has no such layout.
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=layout)
    if config.strategy == "data_parallel":
        module = nn.DataParallel(module)
    if config.runtime.compile == "on":
        # Each shape is a graph of its own, and a sweep brings many. Beyond the limit torch would not compile.
        torch._dynamo.config.recompile_limit = 64
        # Otherwise each process times kernels that add up in other orders, and takes the fastest.
        torch._inductor.config.deterministic = config.runtime.deterministic
        module = torch.compile(module, dynamic=False)  # type: ignore[assignment]
    return module


def operations(module: nn.Module, transform: Transform) -> int:
    """Floating-point operations of one image's forward pass, in convolutions and matrix products.

    A multiplication and the addition after it are two. Attention that torch has fused is left out.
    """
    # Takes half a second, which jobs on GPUs need not wait.
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(torch.zeros(1, 3, *transform.out_size))
    return int(counter.get_total_flops())


def embedding_dim(module: nn.Module, num_classes: int) -> int:
    """How many features the head sees."""
    head = head_of(module, num_classes)
    return head.in_features if isinstance(head, nn.Linear) else head.in_channels


def head_of(module: nn.Module, num_classes: int) -> nn.Linear | nn.Conv2d:
    """The layer that turns pooled features into logits: the last linear one of that width, or the last of all."""
    layers = [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    # Tracing may change the order of modules.
    fitting = [layer for layer in layers if isinstance(layer, nn.Linear) and layer.out_features == num_classes]
    return (fitting or layers)[-1]
