"""Weights: named ones, checkpoints as people have them, and their digest."""

import argparse
import hashlib
import logging
import pickle
import re
from pathlib import Path

import torch
from torch import nn

from mgpu_ddp.config.checks import require
from mgpu_ddp.config.schema import ModelConfig, TimmConfig
from mgpu_ddp.errors import UsageError
from mgpu_ddp.models.timm_models import download_timm

log = logging.getLogger("mgpu_ddp")

CHECKPOINTS = (".pt", ".pth", ".safetensors")


PREFIXES = ("module.", "_orig_mod.", "resnet.")
"""What DataParallel and DDP, torch.compile and the tutorial's SimpleModel put before every key."""


NESTS = ("state_dict", "model_state_dict", "model")


OTHERS = ("state_dict_ema", "model_ema")
"""What training scripts may keep beside these."""


def load_weights(module: nn.Module, num_classes: int, config: ModelConfig) -> None:
    """Fill the module from the named weights or the checkpoint, if there are any. Rank 0 only: DDP shares them.

    Raises:
        UsageError: a file is missing, hostile or does not fit; names the keys.
    """
    if config.weights is None:
        return
    if config.weights.endswith(CHECKPOINTS):
        state = _strip(_read_checkpoint(Path(config.weights)))
    elif isinstance(config, TimmConfig):
        state = _read_checkpoint(download_timm(config, module))
    else:
        state = _named_state(config)
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
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
            f"model.weights must fit {config.name} with {num_classes} classes, got {config.weights!r}:"
            f" {'; '.join(problems)}. Set model.name and model.num_classes to the checkpoint's."
        )
    module.load_state_dict(state, strict=False)


def _named_state(config: ModelConfig) -> dict[str, torch.Tensor]:
    import torchvision

    weights = torchvision.models.get_model_weights(config.name)[config.weights]
    try:
        state: dict[str, torch.Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:
        file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
        raise UsageError(
            f"model.weights must be on this machine or reachable, got {config.weights!r} ({gist(error)}). Put"
            f" {weights.url.rpartition('/')[2]} at {file}, or give a checkpoint path."
        ) from None
    return state


def gist(error: Exception) -> str:
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
            f"model.weights must be a checkpoint of tensors alone, got {str(path)!r} ({gist(error)}). {remedy}"
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
