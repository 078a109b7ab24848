"""A classifier."""

import torch
from torch import nn

import mgpu_ddp


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 7)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.features(images).mean(dim=(2, 3)))
        return logits


def build() -> nn.Module:
    torch.manual_seed(3)
    net = Net()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -1, 1)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    return net


if __name__ == "__main__":
    mgpu_ddp.main(model=build)
