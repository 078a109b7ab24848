"""Fused convolutions on a real GPU: the model's logits, and a row's bits wherever it stands in the batch."""

import copy

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

import torchvision

from mgpu_ddp.models.fusion import FUSED, fold_batch_norms, fuse_activations
from mgpu_ddp.models.head import head_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
FUSED_NAMES = ["resnet18", "resnet34", "resnet50", "resnext50_32x4d", "densenet121"]
OTHERS = ["squeezenet1_1", "mobilenet_v3_large", "efficientnet_b0", "vit_b_16"]
DTYPES = [torch.float16, torch.bfloat16]


def folded_model(name: str, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = False
    module = torchvision.models.get_model(name, weights=None, num_classes=100).eval()
    return fold_batch_norms(module).cuda().to(dtype).to(memory_format=torch.channels_last)


def moved_rows_keep_their_bits(module: torch.nn.Module, dtype: torch.dtype, batch_size: int) -> bool:
    images = torch.randn(batch_size, 3, 224, 224, device="cuda").to(dtype)
    order = torch.randperm(batch_size, device="cuda")
    here = module(images.contiguous(memory_format=torch.channels_last))
    there = module(images[order].contiguous(memory_format=torch.channels_last))
    return torch.equal(here[order], there)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUSED_NAMES)
@torch.inference_mode()
def test_fused_models_give_the_logits_and_the_same_bits_anywhere(name: str, dtype: torch.dtype) -> None:
    assert name.startswith(FUSED)
    folded = folded_model(name, dtype)
    images = torch.randn(32, 3, 224, 224, device="cuda").contiguous(memory_format=torch.channels_last)
    expected = copy.deepcopy(folded).float()(images)
    alone = folded(images.to(dtype)).float()
    fused = fuse_activations(folded, head_of(folded, 100))
    assert any("cudnn_convolution" in str(node.target) for node in fused.graph.nodes)
    got = fused(images.to(dtype)).float()
    # No further from fp32 than the model is without fusing.
    assert (got - expected).abs().max() <= 2 * (alone - expected).abs().max() + 1e-3
    for batch_size in (1, 8, 32, 256):
        assert moved_rows_keep_their_bits(fused, dtype, batch_size), batch_size


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("name", OTHERS)
@torch.inference_mode()
def test_other_models_give_the_same_bits_anywhere(name: str, dtype: torch.dtype) -> None:
    assert not name.startswith(FUSED)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    assert moved_rows_keep_their_bits(folded_model(name, dtype), dtype, 32)


@pytest.mark.xfail(strict=True, reason="cuBLAS: VGG's linear layers in half precision")
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_vgg_gives_the_same_bits_anywhere(dtype: torch.dtype) -> None:
    assert moved_rows_keep_their_bits(folded_model("vgg11_bn", dtype), dtype, 32)
