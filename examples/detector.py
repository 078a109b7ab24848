"""A detector of torchvision's: a row has as many boxes as its image has objects.

mgpu-infer examples/detector.py data=folder data.root=photos batch_size=8
"""

import os

import torch
from torch import nn
from torchvision.models import get_model
from torchvision.transforms._presets import ImageClassification

import mgpu_ddp

DETECTOR = os.environ.get("DETECTOR", "fasterrcnn_resnet50_fpn_v2")
CHECKPOINT = os.environ.get("CHECKPOINT")
"""A state dict of your own; torchvision's trained weights without one."""
SIZE = int(os.environ.get("SIZE", "640"))


def build_model() -> nn.Module:
    model = get_model(DETECTOR, weights=None if CHECKPOINT else "DEFAULT", weights_backbone=None)
    if CHECKPOINT:
        model.load_state_dict(torch.load(CHECKPOINT, weights_only=True))
    return model


def build_transform() -> ImageClassification:
    """The square in the middle, in whose pixels boxes are then counted. The detectors normalise it themselves.

    A preset, which a GPU applies; a function (PIL image) -> Tensor would keep decoding on the CPU.
    """
    return ImageClassification(crop_size=SIZE, resize_size=SIZE, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def keep_likely(found: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Of what forward returned, for each image `boxes` (k, 4), `labels` (k,) and `scores` (k,), the likely."""
    return [{name: values[image["scores"] > 0.5] for name, values in image.items()} for image in found]


if __name__ == "__main__":
    mgpu_ddp.main(model=build_model, transform=build_transform, outputs=keep_likely)
