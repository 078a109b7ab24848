"""Max pooling, run by Triton's interpreter, against torch's own."""

from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from mgpu_ddp.models import max_pool_kernel


def run(images: torch.Tensor, pool: nn.MaxPool2d) -> tuple[torch.Tensor, str]:
    module = nn.Sequential(pool)
    max_pool_kernel.replace_max_pools(module)
    return module(images), type(module[0]).__name__


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("options", "replaced"),
    [
        ({"kernel_size": 3, "stride": 2, "padding": 1}, True),
        ({"kernel_size": 2}, True),
        ({"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 1)}, True),
        ({"kernel_size": 3, "stride": 2, "ceil_mode": True}, False),
        ({"kernel_size": 2, "dilation": 2}, False),
    ],
)
def test_pooling_is_torchs(
    interpreter: ProcessPoolExecutor, options: dict[str, Any], replaced: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 5, 9, 12).to(dtype)
    images[0, 1, 2, 3], images[1, 2, 4, 4], images[1, 4] = torch.nan, torch.inf, -torch.inf
    images = images.contiguous(memory_format=torch.channels_last)
    pool = nn.MaxPool2d(**options)
    got, kind = interpreter.submit(run, images, pool).result()
    assert (kind == "MaxPool") == replaced
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got.nan_to_num(7.0), pool(images).nan_to_num(7.0))
    in_rows, _ = interpreter.submit(run, images.contiguous(), pool).result()
    assert torch.equal(in_rows.nan_to_num(7.0), pool(images).nan_to_num(7.0))
