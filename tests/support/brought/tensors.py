"""A dataset of tensors that are model input already, and a model that takes nothing else."""

import torch
from torch import nn

import mgpu_ddp


class Tensors:
    def __init__(self) -> None:
        self.noise = torch.randn(23, 5, 6, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.noise[index]


def build() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(30, 4))


if __name__ == "__main__":
    mgpu_ddp.main(model=build, dataset=Tensors)
