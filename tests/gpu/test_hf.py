"""transformers' models on a real GPU: a row's bits wherever it stands in the batch, and what half precision leaves."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("transformers")
os.environ["HF_HUB_OFFLINE"] = "1"

from mgpu_ddp.config.schema import Config, FakeConfig, HfConfig, TransformConfig
from mgpu_ddp.config.script import Script
from mgpu_ddp.distributed.world import World
from mgpu_ddp.models.build import load_model
from mgpu_ddp.models.prepare import set_backends
from tests.support.hf import SIDE, TINY, features_of, save_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
KINDS = ["vit", "dinov2", "dinov3_vit", "clip", "siglip", "beit", "swin", "convnext", "resnet", "efficientnet"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_rows_keep_their_bits_and_their_numbers(kind: str, dtype: torch.dtype, tmp_path: Path, world: World) -> None:
    assert kind in TINY
    save_model(tmp_path, kind, features_of(kind))
    config = Config(data=FakeConfig(), transform=TransformConfig(), model=HfConfig(name=str(tmp_path)))
    module = load_model(config, Script(), world).module.eval()
    set_backends("fp32", deterministic=True)
    images = torch.randn(64, 3, SIDE, SIDE)
    wanted = module(images)["embedding"]
    module = module.to("cuda", dtype).to(memory_format=torch.channels_last)
    for batch_size in (1, 8, 64):
        batch = images[:batch_size].to("cuda", dtype)
        order = torch.randperm(batch_size, device="cuda")
        here = module(batch.contiguous(memory_format=torch.channels_last))["embedding"]
        there = module(batch[order].contiguous(memory_format=torch.channels_last))["embedding"]
        assert torch.equal(here[order], there), batch_size
        tolerance = 1e-3 if dtype == torch.float32 else 5e-2
        assert (here.float().cpu() - wanted[:batch_size]).abs().max() <= tolerance * wanted.abs().max()
