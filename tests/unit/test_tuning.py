"""`batch_size=auto`, with a real model on this machine."""

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from mgpu_ddp.config import Config, FakeConfig, ModelConfig, TransformConfig
from mgpu_ddp.job import Job
from mgpu_ddp.manifest import Manifest
from mgpu_ddp.predict import Predictor
from mgpu_ddp.preprocess import plain
from mgpu_ddp.tuning import LARGEST, SMALLEST, find_batch_size
from mgpu_ddp.world import World
from tests.unit.test_predict import CLASSES, SIDE, TOO_MUCH


class Hungry(nn.Module):
    """A model that costs as much for one image as for a batch, and does not take more than `most`."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.sizes = most, set[int]()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.sizes.add(len(images))
        if len(images) > self.most:
            torch.empty(TOO_MUCH, dtype=torch.uint8)
        torch.ones(600, 600) @ torch.ones(600, 600)
        return images.sum(dim=(1, 2, 3))[:, None] * torch.arange(CLASSES)


def job(run_dir: Path) -> Job:
    config = Config(data=FakeConfig(), transform=TransformConfig(), model=ModelConfig(), batch_size="auto")
    return Job(name="0", config=config, run_dir=run_dir)


def find(module: nn.Module, run_dir: Path, world: World) -> int:
    def ready() -> Predictor:
        return Predictor(module, plain(SIDE), job(run_dir).config, world.device)

    return find_batch_size(job(run_dir), plain(SIDE), world, ready)


def test_it_grows_while_that_pays_and_as_far_as_memory_goes(
    tmp_path: Path, world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mgpu_ddp"), "propagate", True)
    caplog.set_level(logging.INFO, "mgpu_ddp")
    module = Hungry(most=4 * SMALLEST)
    assert find(module, tmp_path, world) == 4 * SMALLEST
    assert max(module.sizes) == 8 * SMALLEST < LARGEST
    assert caplog.messages[-1] == f"batch_size=auto chose {4 * SMALLEST}"


def test_a_folder_keeps_the_batch_size_it_was_started_with(tmp_path: Path, world: World) -> None:
    Manifest(fingerprint={}, start=0, stop=9, batch_size=48).write(tmp_path)
    module = Hungry(most=8)
    assert find(module, tmp_path, world) == 48
    assert not module.sizes, "nothing was tried"
