"""timm's fine-tunes in repositories of the Hugging Face hub and in folders: their config.json, read as data."""

import math
from pathlib import Path
from typing import Any

from mgpu_ddp.config.schema import FOLDER, TimmConfig
from mgpu_ddp.distributed.host import available_bytes, require_memory
from mgpu_ddp.distributed.world import World
from mgpu_ddp.models.checkpoint import read_state
from mgpu_ddp.models.class_names import check_names
from mgpu_ddp.models.hub import CONFIG, WEIGHTS, Repository
from mgpu_ddp.models.model import State

SCHEMES = ("hf_hub:", "hf-hub:", FOLDER)
KEY = "model.name"
LARGEST = 2048
"""Side of an image, in pixels; no other number of an architecture is larger."""
SETTINGS = ("input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "pool_size")
"""Of the pretrained_cfg: how images are prepared, and what the architecture needs for it."""
ARGUMENTS = (
    *("num_classes", "in_chans", "img_size", "global_pool", "class_token", "reg_tokens", "no_embed_class"),
    *("init_values", "window_size", "dynamic_img_size", "drop_rate", "drop_path_rate", "proj_drop_rate"),
    *("attn_drop_rate", "patch_drop_rate"),
)
"""Of the model_args: what changes the layers of an architecture. Others of create_model's load files."""
WIDE = 4096
"""Few heads see more features."""


def is_hosted(name: str) -> bool:
    """Tell a repository or a folder from a name of timm's own list."""
    return name.startswith(SCHEMES)


def read_hosted(wanted: Any, world: World) -> dict[str, Any] | None:
    """Read on rank 0 what describes the model; None for one of timm's own list. Collective: every rank calls this.

    Returns `architecture`, `args` to build it with, `num_classes`, `hf_hub_id` (the weights), and `names` of classes.

    Raises:
        UsageError: there is no such repository, or it describes none.
    """
    if not isinstance(wanted, TimmConfig) or not is_hosted(wanted.name):
        return None
    mine: dict[str, Any] | None = None
    with world.together("read the model's repository"):
        if world.rank == 0:
            mine = _read(_repository(wanted), wanted.name)
    found: dict[str, Any] = world.share("the model's repository", mine)
    return found


def fetch_hosted(wanted: TimmConfig) -> State:
    """Get the weights of a repository or a folder. Rank 0 only."""
    repository = _repository(wanted)
    path = repository.get(WEIGHTS)
    if path is None:
        raise repository.without_safetensors()
    return read_state(path)


def _repository(wanted: TimmConfig) -> Repository:
    place = wanted.name.partition(":")[2]
    if wanted.name.startswith(FOLDER):
        return Repository(KEY, wanted.name, place, folder=Path(place))
    # A run folder names the commit that it began with.
    began_with = wanted.weights if wanted.weights and wanted.weights.startswith(f"{place}@") else place
    return Repository(KEY, wanted.name, began_with)


def _read(repository: Repository, name: str) -> dict[str, Any]:
    values = repository.read_json(CONFIG)
    if values is None:
        raise repository.refused("a repository of a model", f"it has no {CONFIG}", "Choose another.")
    # Older ones have all of it side by side.
    nested = values.get("pretrained_cfg", values)

    def require(ok: bool, key: str) -> None:
        if not ok:
            why = f"{key} of its {CONFIG}: {_value(values, nested, key)!r:.80}"
            raise repository.refused("a repository of a model as timm saves it", why, "Correct it, or choose another.")

    require(isinstance(nested, dict), "pretrained_cfg")
    architecture = values.get("architecture")
    require(isinstance(architecture, str), "architecture")
    num_classes = values.get("num_classes", nested.get("num_classes"))
    require(_is_int(num_classes, 0, 10**9), "num_classes")
    assert isinstance(num_classes, int)
    require_memory(KEY, name, 4 * WIDE * num_classes, available_bytes(), "Choose another.")
    settings = {key: nested[key] for key in SETTINGS if nested.get(key) is not None}
    for key, value in settings.items():
        require(_SETTING[key](value), key)
    arguments = values.get("model_args") or {}
    require(isinstance(arguments, dict) and all(map(_is_argument, arguments.items())), "model_args")
    size = arguments.get("img_size")
    if size is not None and settings.get("fixed_input_size"):
        # Some releases of timm left the size that the architecture has by itself.
        settings["input_size"] = [3, *(size if isinstance(size, list) else [size] * 2)]
    return {
        "architecture": architecture,
        "args": {key: value for key, value in arguments.items() if key != "num_classes"},
        "settings": settings | {"num_classes": num_classes},
        "num_classes": num_classes,
        "hf_hub_id": name if name.startswith(FOLDER) else f"{repository.name}@{repository.revision}",
        "names": _names(values, nested, num_classes, name),
    }


def _value(values: dict[str, Any], nested: Any, key: str) -> Any:
    return nested[key] if isinstance(nested, dict) and key in nested else values.get(key)


def _names(values: dict[str, Any], nested: dict[str, Any], num_classes: int, name: str) -> tuple[str, ...] | None:
    """The descriptions of the labels, or the labels themselves; None where it has neither."""
    labels = values.get("label_names", nested.get("label_names", nested.get("labels")))
    if labels is None:
        return None
    described = values.get("label_descriptions", nested.get("label_descriptions"))
    if isinstance(described, dict) and isinstance(labels, list):
        labels = [described.get(label, label) if isinstance(label, str) else label for label in labels]
    return check_names(KEY, labels, num_classes, Path(name), f"Correct label_names of its {CONFIG}.")


def _is_int(value: Any, low: int = 1, high: int = LARGEST) -> bool:
    return type(value) is int and low <= value <= high


def _is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    return type(value) in (int, float) and low <= value <= high


def _are_three(value: Any, low: float) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_is_number(number, low, 1000) for number in value)


def _are_sizes(value: Any, numbers: int) -> bool:
    return isinstance(value, list) and len(value) == numbers and all(map(_is_int, value))


_SETTING = {
    "input_size": lambda value: _are_sizes(value, 3),
    "fixed_input_size": lambda value: isinstance(value, bool),
    "interpolation": lambda value: isinstance(value, str),
    "crop_pct": lambda value: _is_number(value, 0.1, 10),
    "crop_mode": lambda value: isinstance(value, str),
    "mean": lambda value: _are_three(value, -1000),
    "std": lambda value: _are_three(value, 1e-6),
    "pool_size": lambda value: _are_sizes(value, 2),
}


def _is_argument(item: tuple[str, Any]) -> bool:
    key, value = item
    if key not in ARGUMENTS or (isinstance(value, str) and key != "global_pool"):
        return False
    high = 10**9 if key == "num_classes" else LARGEST
    return value is None or isinstance(value, bool | str) or _is_number(value, 0, high) or _are_sizes(value, 2)
