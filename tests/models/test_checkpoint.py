"""Checkpoints as people have them: wrapped, nested, with another head, or beside settings, and what is advised."""

import logging
import sys
from argparse import Namespace
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models import get_model

from mgpu_ddp.config.schema import Config, FakeConfig, ModelConfig, TransformConfig
from mgpu_ddp.config.script import Script
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import UsageError
from mgpu_ddp.models.build import load_model
from mgpu_ddp.models.checkpoint import read_checkpoint
from mgpu_ddp.models.model import Model, State
from mgpu_ddp.models.weights import weights_digest

NAME = "resnet18"


def trained(num_classes: int = 7, seed: int = 77) -> nn.Module:
    torch.manual_seed(seed)
    return get_model(NAME, weights=None, num_classes=num_classes)


def load(path: Path, world: World, **changes: Any) -> Model:
    model = ModelConfig(**{"name": NAME, "weights": str(path)} | changes)
    return load_model(Config(data=FakeConfig(), transform=TransformConfig(), model=model), Script(), world)


def saved(path: Path, content: Any) -> Path:
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


def behind(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def with_head(name: str, state: State) -> State:
    """A backbone with a head of its own, as people write them."""
    return {key.replace("fc.", f"{name}.") if key.startswith("fc.") else f"backbone.{key}": state[key] for key in state}


def averaged(state: State) -> State:
    module = trained()
    module.load_state_dict(state)
    return AveragedModel(module).state_dict()


LAYOUTS: dict[str, Callable[[State], Any]] = {
    "net": lambda state: behind("net.", state),
    "encoder": lambda state: behind("student.encoder.", state),
    "twice": lambda state: {"checkpoint": {"model": behind("module.", state)}},
    "unknown nest": lambda state: {"weights_of_epoch_3": state, "epoch": 3},
    "head": lambda state: with_head("head", state),
    "head in a Sequential": lambda state: with_head("classifier.1", state),
    "head replaced in place": lambda state: {key.replace("fc.", "fc.1."): value for key, value in state.items()},
    "weights of a loss": lambda state: behind("model.", state) | {"criterion.weight": torch.ones(7)},
    "averaged": averaged,
    "only averaged": lambda state: {"state_dict_ema": state, "epoch": 3},
    "optimizer": lambda state: {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_is_found_by_the_names_of_its_keys(tmp_path: Path, world: World, layout: str) -> None:
    module = trained()
    path = saved(tmp_path / "w.ckpt", LAYOUTS[layout](module.state_dict()))
    assert weights_digest(load(path, world, num_classes=7).module) == weights_digest(module)


@pytest.mark.parametrize(
    "beside",
    [
        lambda state, other: {"state_dict_ema": other, "state_dict": state},
        lambda state, other: {"model": state, "model_ema": behind("module.", other) | {"n_averaged": torch.tensor(3)}},
        lambda state, other: behind("ema_model.", other) | behind("model.", state),
        lambda state, other: behind("model.", state) | behind("model_ema.module.", other),
    ],
)
def test_of_trained_and_averaged_weights_the_trained_are_taken(
    tmp_path: Path, world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, beside: Any
) -> None:
    monkeypatch.setattr(logging.getLogger("mgpu_ddp"), "propagate", True)
    caplog.set_level(logging.INFO, "mgpu_ddp")
    module, other = trained(), trained(seed=78)
    path = saved(tmp_path / "w.pt", beside(module.state_dict(), other.state_dict()))
    assert weights_digest(load(path, world, num_classes=7).module) == weights_digest(module)
    assert "ema" in caplog.text, "what was left is said"


class Kind(Enum):
    """A class of the training script's."""

    A = "a"


SETTINGS: dict[str, Any] = {
    "plain": {"lr": 0.1, "arch": NAME},
    "namespace": Namespace(lr=0.1, out=Path("x")),
    "omegaconf": OmegaConf.create({"optimizer": {"lr": 0.1, "betas": [0.9, 0.99]}, "name": "x"}),
    "path": {"root": Path("x")},
    "numpy": {"lr": np.float64(0.1)},
    "enum": {"kind": Kind.A},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_lightnings_checkpoint_loads_whatever_its_settings_are(tmp_path: Path, world: World, settings: str) -> None:
    """The layout is that of Lightning 2.6."""
    module = trained()
    content = {
        "epoch": 1,
        "global_step": 2,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": behind("model.", module.state_dict()) | {"criterion.weight": torch.ones(7)},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_loop.batch_progress": {"total": {"ready": 2}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": None, "dirpath": "x"}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.1}]}],
        "lr_schedulers": [{"last_epoch": 2}],
        "hparams_name": "kwargs",
        "hyper_parameters": SETTINGS[settings],
    }
    model = load(saved(tmp_path / "last.ckpt", content), world)
    assert weights_digest(model.module) == weights_digest(module)
    assert model.num_classes == 7


def test_classes_that_a_checkpoint_names_are_never_imported(tmp_path: Path, world: World) -> None:
    (tmp_path / "settings_of_mine.py").write_text("class Settings:\n    def __init__(self):\n        self.lr = 1\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        from settings_of_mine import Settings  # type: ignore[import-not-found]

        saved(tmp_path / "w.ckpt", {"state_dict": trained().state_dict(), "hyper_parameters": Settings()})
        del sys.modules["settings_of_mine"]
        assert load(tmp_path / "w.ckpt", world).num_classes == 7
        assert "settings_of_mine" not in sys.modules


def test_a_whole_module_is_refused_with_what_to_save(tmp_path: Path) -> None:
    for content in (trained(), {"model": trained(), "epoch": 3}):
        path = saved(tmp_path / "w.pt", content)
        with pytest.raises(UsageError, match=r"with objects that only code can make'\. Save module\.state_dict\(\)\.$"):
            read_checkpoint(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("head", ["fc", "head"])
def test_the_number_of_classes_is_the_checkpoints(tmp_path: Path, world: World, head: str, suffix: str) -> None:
    module = trained(37)
    state = module.state_dict() if head == "fc" else with_head("head", module.state_dict())
    model = load(saved(tmp_path / f"w{suffix}", state), world)
    assert (model.num_classes, model.weights) == (37, str(tmp_path / f"w{suffix}"))
    assert weights_digest(model.module) == weights_digest(module)


ADVICE: dict[str, tuple[Callable[[], State], dict[str, Any], str]] = {
    "classes": (lambda: trained(37).state_dict(), {"num_classes": 5}, "It has 37 classes: set model.num_classes=37."),
    "name": (
        lambda: behind("net.", get_model("mobilenet_v3_small", weights=None, num_classes=37).state_dict()),
        {},
        "It fits model.name=mobilenet_v3_small: set that.",
    ),
    "timm": (
        lambda: __import__("timm").create_model("vit_tiny_patch16_224", num_classes=37).state_dict(),
        {},
        "It fits model=timm model.name=vit_tiny_patch16_224: set that.",
    ),
    "layers beyond the model": (
        lambda: with_head("head", trained().state_dict()) | {"neck.weight": torch.ones(2, 2)},
        {},
        "Name its model by model.name, or load it in a script of yours (docs/own.md).",
    ),
    "two heads": (
        lambda: (
            with_head("head", trained().state_dict())
            | {"other.weight": torch.ones(3, 512), "other.bias": torch.ones(3)}
        ),
        {},
        "Name its model by model.name, or load it in a script of yours (docs/own.md).",
    ),
}


@pytest.mark.parametrize("case", ADVICE)
def test_a_misfit_is_one_line_with_the_nearest_way(tmp_path: Path, world: World, case: str) -> None:
    make, changes, advice = ADVICE[case]
    path = saved(tmp_path / "w.pt", make())
    with pytest.raises(UsageError) as raised:
        load(path, world, **changes)
    assert str(raised.value).startswith(f"model.weights must fit {NAME} with ")
    assert str(raised.value).endswith(f". {advice}")
    assert "\n" not in str(raised.value)
