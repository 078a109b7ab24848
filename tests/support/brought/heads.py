"""A model of several heads, whose outputs are named."""

from collections.abc import Mapping

import torch
from torch import nn

import mgpu_ddp
from tests.support.brought.classes import build as build_classes


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classes = build_classes()
        self.kind = nn.Linear(8, 3)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = self.classes.features(images)
        features = maps.mean(dim=(2, 3))
        return {"features": features, "kind": self.kind(features), "mask": maps[:, :2, :3, :4]}


def outputs(found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    kind = found["kind"].softmax(dim=1)
    return {
        "kind": kind.argmax(dim=1),
        "is_sure": kind.amax(dim=1) > 0.4,
        "share": kind.amax(dim=1),
        "features": found["features"],
        "mask": (found["mask"] * 10).clamp(0, 255).to(torch.uint8),
    }


def build() -> nn.Module:
    return Heads()


if __name__ == "__main__":
    mgpu_ddp.main(model=build, outputs=outputs, version="1")
