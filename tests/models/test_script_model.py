"""A script's functions for a model and a transform: those that may be, and the words for those that may not."""

import functools
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from mgpu_ddp.config.schema import TransformConfig
from mgpu_ddp.config.script import Script
from mgpu_ddp.data.script_dataset import ItemKind, ScriptDataset
from mgpu_ddp.errors import UsageError
from mgpu_ddp.models.script_model import build_script_model
from mgpu_ddp.models.script_transform import script_transform

TO_FLOAT = (v2.ToImage(), v2.ToDtype(torch.float32, scale=True))

OWN = TransformConfig(name="script")


def resized(image: Image.Image, side: int = 32) -> torch.Tensor:
    small: torch.Tensor = v2.Compose([v2.Resize((side, side)), *TO_FLOAT])(image)
    return small


def described(transform: Any) -> str:
    found = script_transform(Script(transform=lambda: transform), None, OWN)
    assert found is not None
    return str(found.described()["function"])


def test_a_transform_is_any_callable_and_its_settings_tell_it_from_others() -> None:
    for composed in (v2.Compose([v2.Resize((32, 32)), *TO_FLOAT]), v2.Compose([v2.Resize((32, 40)), *TO_FLOAT])):
        assert str(list(composed.transforms[0].size)) in described(composed)
    assert described(resized) == f"{__name__}.resized"
    # Its address, which it would print, is another one in each process.
    assert described(functools.partial(resized, side=40)) == "functools.partial"


@pytest.mark.parametrize("argument", ["model", "transform"])
def test_a_function_that_leaves_the_program_is_told(argument: str) -> None:
    def leave() -> Any:
        raise SystemExit("no net.pt")

    script = Script(**{argument: leave})
    with pytest.raises(UsageError, match=rf"^{argument}: the function raised SystemExit: no net.pt \(test_script_m"):
        build_script_model(script, 0) if argument == "model" else script_transform(script, None, OWN)


@pytest.mark.parametrize("wanted", [{"mean": 0.5}, {"crop": None}], ids=str)
def test_keys_that_tensors_of_a_dataset_leave_nothing_to_do_are_refused(wanted: dict[str, Any]) -> None:
    kind = ItemKind(image="tensor", carried={}, shape=(3, 8, 8))
    dataset = ScriptDataset(dataset=[], kind=kind, in_shards=False)
    said = rf"^transform\.{next(iter(wanted))} must be left out where the dataset yields float Tensors"
    with pytest.raises(UsageError, match=said):
        script_transform(Script(), dataset, TransformConfig(**wanted))
    assert script_transform(Script(), dataset, TransformConfig()) is not None


@pytest.mark.parametrize(("name", "warnings"), [("RandomResizedCrop", 1), ("CenterCrop", 0)])
def test_a_random_transform_is_told(name: str, warnings: int, caplog: pytest.LogCaptureFixture) -> None:
    described(v2.Compose([getattr(v2, name)((16, 16)), *TO_FLOAT]))
    assert sum("the transform is random" in message for message in caplog.messages) == warnings
