"""Reads checkpoints as people have them: the state dicts in a file, of which no code is run."""

import os
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mgpu_ddp.config.checks import require
from mgpu_ddp.config.resolved import RANDOM
from mgpu_ddp.config.script import CHECKPOINTS
from mgpu_ddp.data.input_file import open_value
from mgpu_ddp.errors import UsageError
from mgpu_ddp.models.model import State

DEEPEST = 2
"""State dicts are looked for so many keys deep: checkpoint["model"]["state_dict"]."""
MOST_WORDS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """The content of a file."""

    path: Path
    states: dict[str, State]
    """By the keys that lead to them, joined by dots; the file itself may be one, by the empty text."""
    words: tuple[str, ...]
    """Texts beside them: training scripts keep the name of the model there."""


class Foreign:
    """An object of a class that no tensor needs, in its place: the class itself is never imported."""

    state: Any = None

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


def is_checkpoint(weights: str | None) -> bool:
    """Tell a path from the name of weights."""
    return weights is not None and weights.endswith(CHECKPOINTS)


def weights_name(weights: str | None) -> str:
    """Weights as `Resolved` has them: a checkpoint is found again from any folder."""
    if weights is None:
        return RANDOM
    return os.path.abspath(weights) if is_checkpoint(weights) else weights


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the state dicts in a file.

    Raises:
        UsageError: there is no such file, or it holds none.
    """
    open_value("model.weights", path).close()
    try:
        loaded = _load(path)
    except Exception as error:
        is_foreign = isinstance(error, pickle.UnpicklingError)
        remedy = "Save module.state_dict()." if is_foreign else "It may be damaged: copy it again."
        raise UsageError(
            f"model.weights must be a checkpoint of tensors alone, got {str(path)!r} ({in_one_line(error)}). {remedy}"
        ) from None
    states = dict(_states(loaded))
    if not states:
        is_module = any(isinstance(value, Foreign) for value in (loaded, *_values(loaded)))
        found = f"{path} with objects that only code can make" if is_module else str(path)
        require(False, "model.weights", "a state dict", found, "Save module.state_dict().")
    return Checkpoint(path=path, states=states, words=tuple(_words(loaded)))


def read_state(path: Path) -> State:
    """Read the one state dict of a file.

    Raises:
        UsageError: there is no such file, or it holds none.
    """
    return next(iter(read_checkpoint(path).states.values()))


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    # Lightning and others save settings as well, as objects of any class. Those of os and sys torch refuses even so.
    classes = ["argparse.Namespace"]
    # Files in older formats, and damaged ones, are torch.load's to refuse.
    with suppress(Exception):
        classes += torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with torch.serialization.safe_globals([(Foreign, name) for name in classes]), warnings.catch_warnings():
        # It warns of kinds of tensors that are refused later.
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def _states(value: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, State]]:
    if not isinstance(value, dict) or not value or not all(isinstance(key, str) for key in value):
        return
    if all(isinstance(item, torch.Tensor) for item in value.values()):
        yield place, value
    elif depth < DEEPEST:
        for key, item in value.items():
            yield from _states(item, f"{place}.{key}".lstrip("."), depth + 1)


def _values(loaded: Any) -> Iterator[Any]:
    yield from loaded.values() if isinstance(loaded, dict) else ()


def _words(loaded: Any) -> Iterator[str]:
    """The texts in a value, as far as they are near its top."""
    left = [loaded]
    for _ in range(MOST_WORDS):
        if not left:
            return
        value = left.pop(0)
        if isinstance(value, str):
            yield value
        elif isinstance(value, Foreign):
            left.append(value.state)
        elif isinstance(value, dict):
            left += [item for item in value.values() if isinstance(item, str | dict | Foreign)][:MOST_WORDS]


def in_one_line(error: Exception) -> str:
    """Shorten an error whose text goes on for a screen."""
    if isinstance(error, pickle.UnpicklingError):
        return "it holds objects that only code can load"
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return f"{type(error).__name__}: {' '.join(text.split())[:200]}"
