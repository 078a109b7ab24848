"""Classes by their embeddings on a real GPU: the plain computation in fp32, and a row's bits wherever it stands."""

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from mgpu_ddp.config.schema import Config, FakeConfig, ModelConfig, OutputConfig, TransformConfig
from mgpu_ddp.config.script import Script
from mgpu_ddp.distributed.devices import choose_device
from mgpu_ddp.distributed.world import World
from mgpu_ddp.inference.predictor import Predictor
from mgpu_ddp.models.build import load_model
from mgpu_ddp.models.prepare import prepare
from mgpu_ddp.preprocess.transform import plain as plain_transform
from tests.support.choices import resolved
from tests.support.zero_shot import plain, save_classes

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_logits_are_cosines_in_fp32_and_rows_keep_their_bits(tmp_path: Path, world: World, precision: str) -> None:
    names = tuple(f"class {i}" for i in range(1000))
    path, classes = save_classes(tmp_path / "c.safetensors", width=512, names=names)
    config = Config(
        data=FakeConfig(),
        transform=TransformConfig(),
        model=ModelConfig(weights=None, zero_shot=str(path)),
        output=OutputConfig(fields=["embedding", "logits"]),
    )
    world = choose_device(config, world)
    model = load_model(config, Script(), world)
    choices = resolved(precision=precision, transform=plain_transform(224))
    module = prepare(model, config, choices, world)
    predictor = Predictor(module, config, choices, world.device, num_classes=model.num_classes)
    assert module.head.weight.dtype == torch.float32
    assert module.head.weight.is_cuda
    for batch_size in (1, 8, 256):
        images = torch.randint(0, 256, (batch_size, 224, 224, 3), dtype=torch.uint8, device=world.device)
        order = torch.randperm(batch_size, device=world.device)
        here = {name: column.clone() for name, column in predictor(images, batch_size).items()}
        there = predictor(images[order], batch_size)
        on_gpu = {name: tensor.to(world.device) for name, tensor in classes.items()}
        assert torch.allclose(here["logits"], plain(here["embedding"], on_gpu), atol=1e-3)
        for name, column in here.items():
            assert torch.equal(column[order], there[name]), (name, batch_size)
