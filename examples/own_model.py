"""A model of your own with several heads: each becomes a column of the table.

mgpu-infer examples/own_model.py data=folder data.root=photos
"""

import os

import torch
from torch import nn
from torchvision.models import resnet18

import mgpu_ddp

CHECKPOINT = os.environ.get("CHECKPOINT")
"""A state dict of `Photo`; random weights without one."""


class Photo(nn.Module):
    """What is on a photograph, what the weather was, and how good it is."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = resnet18()
        width = self.trunk.fc.in_features
        self.trunk.fc = nn.Identity()
        self.subject = nn.Linear(width, 12)
        self.weather = nn.Linear(width, 4)
        self.quality = nn.Linear(width, 1)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.trunk(images)
        return {
            "subject": self.subject(features).argmax(1),  # (B,): a number
            "weather": self.weather(features).softmax(1),  # (B, 4): a list of four
            "quality": self.quality(features).sigmoid()[:, 0],
        }


def build_model() -> nn.Module:
    photo = Photo()
    if CHECKPOINT:
        photo.load_state_dict(torch.load(CHECKPOINT, weights_only=True))
    return photo


if __name__ == "__main__":
    mgpu_ddp.main(model=build_model)
