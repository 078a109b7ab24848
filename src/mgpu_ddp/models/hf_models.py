"""Models of the Hugging Face hub: transformers' own classes, filled from safetensors by us."""

import hashlib
import inspect
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from mgpu_ddp.config.checks import require
from mgpu_ddp.config.schema import Config, HfConfig
from mgpu_ddp.data.input_file import open_value
from mgpu_ddp.distributed.host import available_bytes
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import UsageError
from mgpu_ddp.models.checkpoint import in_one_line
from mgpu_ddp.models.hf_config import CLS, OF_TEACHER, Found, build_network, read_config, refused, settings_of
from mgpu_ddp.models.hf_transform import Preset, read_preset
from mgpu_ddp.models.hub import CONFIG, WEIGHTS, Repository
from mgpu_ddp.models.input_transform import STANDARD_SIZE
from mgpu_ddp.models.model import Model, State
from mgpu_ddp.models.weights import named

log = logging.getLogger("mgpu_ddp")

INDEX, IMAGES = "model.safetensors.index.json", "preprocessor_config.json"
OLDEST = (5, 5)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64)
"""Others would be codes of a quantization. int64 is that of counts and positions."""
NEEDLESS = re.compile(r"(^|\.)(pooler|position_ids|relative_position_index|relative_coords_table|mask_token)(\.|$)")
"""Keys of weights that a classifier does not use, and that files have all the same."""


class HfModel(nn.Module):
    """A network of transformers that returns logits or embeddings, which are a column of that name if so wanted."""

    def __init__(self, network: nn.Module, output: str, *, flips_channels: bool, as_column: bool = True) -> None:
        super().__init__()
        self.network, self.output, self.flips_channels, self.as_column = network, output, flips_channels, as_column

    def forward(self, images: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        returned = self.network(images.flip(1) if self.flips_channels else images)
        values: torch.Tensor = returned[self.output]
        if self.output == "logits":
            return values
        embedding = values[:, 0] if self.output == CLS else values.flatten(1)
        return {"embedding": embedding} if self.as_column else embedding


def load_hf(config: Config, wanted: HfConfig, world: World) -> Model:
    """Build the model that `wanted` names on every rank, and fill it on rank 0. Collective: every rank calls this.

    Rank 0 alone reads the repository.

    Raises:
        UsageError: no such repository, or a model that is of no use; says why.
        OutOfMemoryError: the model does not fit into memory.
    """
    read: dict[str, Any] = {}
    files: list[Path] = []
    with world.together("read the model's repository"):
        if world.rank == 0:
            read, files = _read(wanted.name)
    read = world.share("the model's repository", read)
    with world.together("load the model"):
        import transformers

        # What it would say is said by us, or does not concern the user.
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        found = read_config(read["config"], wanted.name)
        preset, flips_channels = read_preset(read["images"], found.kind, wanted.name, config)
        # Each of two heads has features of its own.
        is_whole = "embedding" not in config.output.computed or not found.architecture.endswith(OF_TEACHER)
        rule = "without embedding for a model of two classifiers"
        require(is_whole, "output.fields", rule, found.architecture, "Leave it out.")
        rule, remedy = "null for a classifier", "Name an image tower, such as openai/clip-vit-base-patch32."
        has_features = wanted.zero_shot is None or found.output != "logits"
        require(has_features, "model.zero_shot", rule, f"{wanted.zero_shot} for {found.architecture}", remedy)
        network = build_network(found, available_bytes() // world.local_size)
        if world.rank == 0:
            _fill(network, found, _state(files, wanted.name))
    module = HfModel(network, found.output, flips_channels=flips_channels, as_column=wanted.zero_shot is None)
    model = _model(found, module, preset, read["weights"])
    return model if module.as_column else replace(model, num_features=_width(model))


def _width(model: Model) -> int:
    """The width of the embeddings, by one image of zeros."""
    side = model.input_size or STANDARD_SIZE
    with torch.no_grad():
        return int(model.module.eval()(torch.zeros(1, 3, side, side)).shape[1])


def _read(name: str) -> tuple[dict[str, Any], list[Path]]:
    """What all ranks need of a repository, and the files of its weights."""
    if util.find_spec("transformers") is None or _release(metadata.version("transformers")) < OLDEST:
        raise UsageError("model must be one whose library is installed, got 'hf'. pip install 'transformers>=5.5'.")
    folder = Path(name).expanduser()
    is_folder = folder.is_dir() or name.startswith(("/", "./", "../", "~"))
    repository = Repository("model.name", name, name, folder=folder if is_folder else None)
    values = repository.read_json(CONFIG)
    if values is None:
        raise refused(name, "one of a model", f"it has no {CONFIG}", "Choose another.")
    # Before anything else is fetched.
    read_config(values, name)
    images = repository.read_json(IMAGES)
    files = _weights_files(repository, name)
    weights = str(folder.resolve()) if is_folder else f"{repository.name}@{repository.revision}"
    return {"config": values, "images": images, "weights": weights}, files


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def _weights_files(repository: Repository, name: str) -> list[Path]:
    try:
        whole = repository.get(WEIGHTS)
    except UsageError:
        # Without a network a cache does not say that a repository in shards has no such file.
        index = repository.read_json(INDEX)
    else:
        if whole is not None:
            return [whole]
        index = repository.read_json(INDEX)
    if index is None:
        raise repository.without_safetensors()
    places, found = index.get("weight_map"), []
    for each in dict.fromkeys(map(str, places.values())) if isinstance(places, dict) and places else ("nothing",):
        path = repository.get(each) if each.endswith(".safetensors") else None
        if path is None:
            rule = f"one whose {INDEX} names its files"
            raise refused(name, rule, f"it names {each[:100]!r}", "Copy it again.")
        found.append(path)
    return found


def _state(files: Sequence[Path], name: str) -> State:
    state: State = {}
    for path in files:
        open_value("model.name", path).close()
        try:
            state |= load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            why = f"{path.name}: {in_one_line(error)}"
            raise refused(name, "one whose safetensors can be read", why, "Copy it again.") from None
    return state


def _fill(network: Any, found: Found, state: State) -> None:
    """Fill the network from tensors under the keys that transformers has ever given them.

    Raises:
        UsageError: they do not fit; names the keys.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    rule = f"one whose weights fit {found.architecture}"
    coded = [f"{key} {value.dtype}" for key, value in state.items() if value.dtype not in DTYPES]
    try:
        how = LoadStateDictConfig(weight_mapping=get_model_conversion_mapping(network), dtype=torch.float32)
        known = inspect.signature(convert_and_load_state_dict_in_model).parameters
        # Older releases have one argument more.
        older = {"tp_plan": None} if "tp_plan" in known else {}
        loaded, _ = convert_and_load_state_dict_in_model(network, state, how, **older)
    except Exception as error:  # transformers and torch raise all kinds
        raise refused(found.name, rule, in_one_line(error), "Copy it again.") from None
    surplus = [key for key in loaded.unexpected_keys if not NEEDLESS.search(key)]
    kinds = {
        "missing": [key for key in loaded.missing_keys if not key.endswith("num_batches_tracked")],
        "unexpected": surplus if found.class_names is not None else [],
        "of another type": coded,
        "of another shape": [
            f"{key} {tuple(mine)} for {tuple(wanted)}" for key, mine, wanted in loaded.mismatched_keys
        ],
        "that cannot be converted": [*loaded.conversion_errors],
    }
    misfits = "; ".join(f"{kind}: {named(keys)}" for kind, keys in kinds.items() if keys)
    if misfits:
        raise refused(found.name, rule, misfits, "Load it by a script of yours (docs/own.md).")
    if surplus and not kinds["unexpected"]:
        log.info("%s: left out %s, which the image's embedding does not need", found.name, named(surplus))


def _model(found: Found, module: HfModel, preset: Preset | None, weights: str) -> Model:
    settings = settings_of(found)
    size, told = settings.get("image_size"), json.dumps([settings, module.flips_channels], sort_keys=True)
    return Model(
        module=module,
        num_classes=None,
        identity={
            "model.name": f"hf/{found.architecture}",
            "model.config": hashlib.sha256(told.encode()).hexdigest(),
        },
        origin=f"{found.architecture} of {weights}",
        class_names=found.class_names,
        preset=preset,
        weights=weights,
        input_size=size if type(size) is int else None,
        is_tried=True,
    )
