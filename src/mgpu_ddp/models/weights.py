"""Fills a model with weights: named ones, or those of checkpoints as people have them."""

import argparse
import hashlib
import logging
import pickle
import re
import warnings
from pathlib import Path

import torch
from torch import nn

from mgpu_ddp.config.checks import require
from mgpu_ddp.config.schema import ModelConfig
from mgpu_ddp.data.input_file import open_value
from mgpu_ddp.errors import UsageError
from mgpu_ddp.models.model import Model, State

log = logging.getLogger("mgpu_ddp")

CHECKPOINTS = (".pt", ".pth", ".safetensors")
PREFIXES = ("module.", "_orig_mod.", "resnet.")
"""Put before every key by DataParallel and DDP, torch.compile and the tutorial's SimpleModel."""
NESTS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts keep the state dict."""
IGNORED = ("state_dict_ema", "model_ema")
"""Keys of averaged weights, which training scripts may keep beside it."""
NAMED_KEYS = 4
"""So many of the keys that do not fit are named."""


def load_weights(model: Model, config: ModelConfig) -> None:
    """Fill the module from the named weights or the checkpoint, if there are any. Rank 0 only.

    Raises:
        UsageError: a file is missing, hostile or does not fit; names the keys.
    """
    if config.weights is None:
        return
    if model.fetch_weights is not None:
        state = model.fetch_weights()
    else:
        state = _without_prefixes(read_checkpoint(Path(config.weights)))
    misfits = _misfits(model.module.state_dict(), state)
    if misfits:
        raise UsageError(
            f"model.weights must fit {config.name} with {model.num_classes} classes, got {config.weights!r}:"
            f" {misfits}. Set model.name and model.num_classes to the checkpoint's."
        )
    model.module.load_state_dict(state, strict=False)


def _misfits(expected: State, given: State) -> str:
    """Name the keys that do not fit; empty if all do."""
    kinds = {
        "missing": [key for key in expected if key not in given and not key.endswith("num_batches_tracked")],
        "unexpected": [key for key in given if key not in expected],
        # Integers would be codes of a quantization that the model does not know.
        "mistyped": [
            f"{key} {value.dtype} for {expected[key].dtype}"
            for key, value in given.items()
            if key in expected and expected[key].is_floating_point() and not value.is_floating_point()
        ],
        "misshapen": [
            f"{key} {tuple(value.shape)} for {tuple(expected[key].shape)}"
            for key, value in given.items()
            if key in expected and value.shape != expected[key].shape
        ],
    }
    return "; ".join(
        f"{kind} {len(keys)} keys ({', '.join(sorted(keys)[:NAMED_KEYS])}{', ...' if len(keys) > NAMED_KEYS else ''})"
        for kind, keys in kinds.items()
        if keys
    )


def read_checkpoint(path: Path) -> State:
    """Read the state dict in a file without running code of it.

    Raises:
        UsageError: there is no such file, or it holds no state dict, or code.
    """
    open_value("model.weights", path).close()
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        # weights_only: a pickle that wants to run code is refused. Many training scripts save their command line too.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            # It warns of kinds of tensors that are refused below.
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        is_foreign = isinstance(error, pickle.UnpicklingError)
        remedy = "Save module.state_dict()." if is_foreign else "It may be damaged: copy it again."
        raise UsageError(
            f"model.weights must be a checkpoint of tensors alone, got {str(path)!r} ({in_one_line(error)}). {remedy}"
        ) from None
    for name in (name for name in IGNORED if isinstance(loaded, dict) and name in loaded):
        log.info("model.weights=%s: took the trained weights, not %s, which it has too", path, name)
    for nest in NESTS:
        if isinstance(loaded, dict) and isinstance(loaded.get(nest), dict):
            loaded = loaded[nest]
    ok = isinstance(loaded, dict) and all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in loaded.items()
    )
    require(ok, "model.weights", "a state dict", str(path), "Save module.state_dict().")
    odd = next((key for key, value in loaded.items() if not _is_plain(value)), None)
    rule, remedy = "a checkpoint of dense tensors of real numbers", "Convert it, and save module.state_dict()."
    require(odd is None, "model.weights", rule, f"{path} with another at {odd}", remedy)
    return dict(loaded)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Tell a tensor that another can be filled with, number by number."""
    is_dense = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized
    return is_dense and not tensor.is_meta and not tensor.is_complex()


def in_one_line(error: Exception) -> str:
    """Shorten an error whose text goes on for a screen."""
    if isinstance(error, pickle.UnpicklingError):
        return "it holds objects that only code can load"
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return f"{type(error).__name__}: {' '.join(text.split())[:200]}"


def _without_prefixes(state: State) -> State:
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
