"""Fills a model with weights: named ones, or those of a checkpoint, whatever stands before its keys."""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mgpu_ddp.config.checks import require
from mgpu_ddp.config.schema import ModelConfig
from mgpu_ddp.errors import UsageError
from mgpu_ddp.models.checkpoint import Checkpoint, read_checkpoint
from mgpu_ddp.models.head import head_of
from mgpu_ddp.models.identify import identify
from mgpu_ddp.models.model import Model, State

log = logging.getLogger("mgpu_ddp")

AVERAGED = re.compile(r"(^|[._])(ema|swa|n_averaged|averaged|teacher|momentum)([._]|$)")
"""Keys of averaged weights, which training scripts keep beside the trained ones."""
OF_TRAINING = re.compile(r"(^|[._])(loss|criterion|metrics?)([._]|$)|loss_fn")
"""Keys that only training needs, such as the weights of classes in a loss."""
NAMED_KEYS = 4
"""So many of the keys that do not fit are named."""
ALIKE = 0.2
"""Models of one family share so many of their keys, as a part of the smaller one's, and more."""
LONGEST_PREFIX = 16
"""Prefixes are of so many words at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """A state dict of a checkpoint under the keys of a model, as far as they were found."""

    state: State
    """With keys that the model does not have, as they stand in the checkpoint."""
    choices: tuple[str, ...]
    """The choice that was made, in words, where there was one."""


def load_weights(model: Model, config: ModelConfig, checkpoint: Checkpoint | None = None) -> None:
    """Fill the module from the named weights or the checkpoint, if there are any. Rank 0 only.

    Raises:
        UsageError: a file is missing, hostile or does not fit; names the keys.
    """
    if config.weights is None:
        return
    if model.fetch_weights is not None:
        fitted = Fitted(state=model.fetch_weights(), choices=())
    else:
        checkpoint = checkpoint or read_checkpoint(Path(config.weights))
        fitted = fit(model, checkpoint)
        odd = next((key for key, value in fitted.state.items() if not _is_plain(value)), None)
        rule, remedy = "a checkpoint of dense tensors of real numbers", "Convert it, and save module.state_dict()."
        require(odd is None, "model.weights", rule, f"{config.weights} with another at {odd}", remedy)
    misfits = _misfits(model.module.state_dict(), fitted.state)
    if misfits:
        raise UsageError(
            f"model.weights must fit {config.name} with {model.num_classes} classes, got {config.weights!r}:"
            f" {misfits}. {_advice(model, fitted, checkpoint)}"
        )
    for choice in fitted.choices:
        log.info("model.weights=%s: %s", config.weights, choice)
    model.module.load_state_dict(fitted.state, strict=False)


def count_classes(model: Model, checkpoint: Checkpoint) -> int | None:
    """The number of classes that a checkpoint of such a model has; None where it has no such head."""
    return _num_classes(fit(model, checkpoint), head_name(model))


def _num_classes(fitted: Fitted, head: str) -> int | None:
    weight = fitted.state.get(f"{head}.weight")
    return len(weight) if weight is not None and weight.dim() > 0 else None


def head_name(model: Model) -> str:
    """The name of the head among the module's layers; empty where it ends in features."""
    if model.num_classes is None:
        return ""
    head = head_of(model.module, model.num_classes)
    return next(str(name) for name, part in model.module.named_modules() if part is head)


def fit(model: Model, checkpoint: Checkpoint) -> Fitted:
    """Find where and behind which prefix a checkpoint has the model's keys, and the head by whatever name it has."""
    expected = model.module.state_dict()
    counts = {place: _prefixes(expected, state) for place, state in checkpoint.states.items()}
    found = [
        (number, not AVERAGED.search(f"{place}.{prefix}"), -len(prefix), place, prefix)
        for place, prefixes in counts.items()
        for prefix, number in prefixes.items()
    ]
    # Where nothing fits, the largest tells best which model it is of.
    largest = max(checkpoint.states, key=lambda place: len(checkpoint.states[place]))
    most, _, _, place, prefix = max(found, default=(0, True, 0, largest, ""))
    others = [other for other in counts if other != place and max(counts[other].values(), default=0) > most / 2]
    choices = [f"took {place or 'the top'}, not {other or 'the top'}" for other in others]

    fitted: State = {}
    surplus: State = {}
    for key, value in checkpoint.states[place].items():
        own = key.removeprefix(prefix)
        is_fitted = key.startswith(prefix) and own in expected
        (fitted if is_fitted else surplus)[own if is_fitted else key] = value
    head = head_name(model)
    missing = _missing(expected, fitted)
    if missing and {_stem(key) for key in missing} == {head}:
        wanted = {key.removeprefix(head): expected[key] for key in missing}
        stems = [stem for stem in dict.fromkeys(map(_stem, surplus)) if _is_such_a_layer(surplus, stem, wanted)]
        if len(stems) == 1:
            fitted |= {f"{head}{leaf}": surplus.pop(f"{stems[0]}{leaf}") for leaf in wanted}
            choices.append(f"took {stems[0]} as {head}")
    unneeded = [key for key in surplus if AVERAGED.search(key) or OF_TRAINING.search(key)]
    if unneeded:
        choices.append(f"left out {named(unneeded)}")
    return Fitted(
        state=fitted | {key: value for key, value in surplus.items() if key not in unneeded}, choices=tuple(choices)
    )


def _prefixes(expected: State, state: State) -> Counter[str]:
    """How many keys of the model stand behind each prefix."""
    counts: Counter[str] = Counter()
    for key in state:
        words = key.split(".", LONGEST_PREFIX)
        counts.update(
            "".join(f"{word}." for word in words[:i]) for i in range(len(words)) if ".".join(words[i:]) in expected
        )
    return counts


def _missing(expected: State, given: State) -> list[str]:
    return [key for key in expected if key not in given and not key.endswith("num_batches_tracked")]


def _stem(key: str) -> str:
    """The name of the layer that a key belongs to."""
    return key.rpartition(".")[0]


def _is_such_a_layer(state: State, stem: str, wanted: State) -> bool:
    """Tell a layer of these parameters, whatever its number of outputs."""
    mine = {key.removeprefix(stem): value for key, value in state.items() if _stem(key) == stem}
    return mine.keys() == wanted.keys() and all(mine[leaf].shape[1:] == wanted[leaf].shape[1:] for leaf in wanted)


def _misfits(expected: State, given: State) -> str:
    """Name the keys that do not fit; empty if all do."""
    shared = [(key, value, expected[key]) for key, value in given.items() if key in expected]
    kinds = {
        "missing": _missing(expected, given),
        "unexpected": [key for key in given if key not in expected],
        # Integers would be codes of a quantization that the model does not know.
        "of another type": [
            f"{key} {value.dtype} for {mine.dtype}"
            for key, value, mine in shared
            if mine.is_floating_point() and not value.is_floating_point()
        ],
        "of another shape": [
            f"{key} {tuple(value.shape)} for {tuple(mine.shape)}"
            for key, value, mine in shared
            if value.shape != mine.shape
        ],
    }
    return "; ".join(f"{kind}: {named(keys)}" for kind, keys in kinds.items() if keys)


def named(keys: Collection[str]) -> str:
    more = f", ... of {len(keys)}" if len(keys) > NAMED_KEYS else ""
    return f"{', '.join(sorted(keys)[:NAMED_KEYS])}{more}"


def _advice(model: Model, fitted: Fitted, checkpoint: Checkpoint | None) -> str:
    """The nearest way to weights and a model that fit."""
    if model.fetch_weights is not None:
        return "The files of its repository do not belong together: choose another."
    expected, classes = model.module.state_dict(), _num_classes(fitted, head_name(model))
    shared = expected.keys() & fitted.state.keys()
    other_shapes = {_stem(key) for key in shared if expected[key].shape != fitted.state[key].shape}
    is_all_there = expected.keys() >= fitted.state.keys() and not _missing(expected, fitted.state)
    if is_all_there and not other_shapes:
        return "Save it as floating-point numbers."
    if is_all_there and other_shapes == {head_name(model)}:
        return f"It has {classes} classes: set model.num_classes={classes}."
    alike = identify(checkpoint, _fits, _resembles) if checkpoint is not None else None
    if alike is not None:
        return f"It fits {alike}: set that."
    return "Name its model by model.name, or load it in a script of yours (docs/own.md)."


def _fits(model: Model, checkpoint: Checkpoint) -> bool:
    """True where only the number of classes may differ."""
    fitted, expected, head = fit(model, checkpoint), model.module.state_dict(), head_name(model)
    return not _missing(expected, fitted.state) and all(
        key in expected and (value.shape == expected[key].shape or _stem(key) == head)
        for key, value in fitted.state.items()
    )


def _resembles(model: Model, checkpoint: Checkpoint) -> bool:
    """True where many of the layers have the same names."""
    expected = model.module.state_dict()
    return any(
        max(_prefixes(expected, state).values(), default=0) > ALIKE * min(len(expected), len(state))
        for state in checkpoint.states.values()
    )


def _is_plain(tensor: torch.Tensor) -> bool:
    """Tell a tensor that another can be filled with, number by number."""
    is_dense = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized
    return is_dense and not tensor.is_meta and not tensor.is_complex()


def weights_digest(module: nn.Module) -> str:
    """sha256 over every parameter and buffer, in the order of the state dict."""
    digest = hashlib.sha256()
    for key, value in module.state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
