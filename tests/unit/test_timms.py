"""timm's models: its own transform to the byte, its weights from files, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

from mgpu_ddp.config import Config, FolderConfig, TimmConfig, TransformConfig
from mgpu_ddp.errors import UsageError
from mgpu_ddp.models import build_model, choose_transform, load_weights, weights_digest


def job(name: str, **changes: object) -> Config:
    return Config(
        data=FolderConfig(root="."), transform=TransformConfig(), model=TimmConfig(name=name, num_classes=5, **changes)
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet"])
def test_images_are_prepared_as_timm_does(name: str) -> None:
    model = build_model(job(name))
    transform = choose_transform(job(name), model)
    theirs = create_transform(**resolve_data_config(model=model.module), is_training=False)
    noise = np.random.default_rng(0)
    for height, width in ((375, 500), (500, 333), (97, 61)):
        image = Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))
        pixels = torch.from_numpy(transform.geometry(image).copy())[None]
        ours = transform.normalise(pixels, dtype=torch.float32, channels_last=False)[0]
        assert torch.equal(ours, theirs(image))


def test_weights_come_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(77)
    module = timm.create_model("test_resnet", num_classes=5)
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    config = job("test_resnet", weights=str(tmp_path / "w.safetensors"))
    model = build_model(config)
    load_weights(model, config.model)
    assert weights_digest(model.module) == weights_digest(module)


@pytest.mark.parametrize("name", ["nosuch", "hf_hub:someone/model", "local-dir:/tmp"])
def test_names_are_those_of_its_list(name: str) -> None:
    with pytest.raises(UsageError, match=r"^model\.name must be a timm model, got"):
        build_model(job(name))


def test_weights_are_files() -> None:
    with pytest.raises(UsageError, match=r"^model\.weights must be null or a path to .* got 'DEFAULT'"):
        build_model(job("test_vit", weights="DEFAULT"))
