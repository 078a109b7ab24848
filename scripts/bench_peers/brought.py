"""Models that a script brings, by the name in MODEL: run by mgpu_ddp, and by the plain loop beside it."""

import os

import torchvision
from torch import nn

BUILDERS = {
    "resnet18": lambda: torchvision.models.resnet18(),
    "detector": lambda: torchvision.models.detection.fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None),
    "segmenter": lambda: torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None),
}
"""Random weights change nothing about the speed of all but a detector, which finds as many boxes as it may."""


def build() -> nn.Module:
    return BUILDERS[os.environ["MODEL"]]()


def outputs(found):  # type: ignore[no-untyped-def]
    """A segmenter's map as classes on a coarse grid, as one would keep it; all else as it is."""
    if "out" not in found:
        return found
    return {"classes": found["out"][:, :, ::16, ::16].argmax(dim=1).byte()}


if __name__ == "__main__":
    import mgpu_ddp

    mgpu_ddp.main(model=build, outputs=outputs if os.environ["MODEL"] == "segmenter" else None)
