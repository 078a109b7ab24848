"""The transform that the user's script brings: a preset, which a GPU can apply, or a function for loader workers."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from mgpu_ddp.config.checks import require
from mgpu_ddp.config.schema import TransformConfig
from mgpu_ddp.config.script import ITSELF, Script, name_of
from mgpu_ddp.data.script_dataset import ScriptDataset
from mgpu_ddp.errors import UsageError, kind_of, place_in_code
from mgpu_ddp.preprocess.transform import AnyTransform, TensorInput, from_weights

log = logging.getLogger("mgpu_ddp")

TRIED_SIZES = ((320, 240), (200, 300))
"""(width, height) of the images that a function is tried on."""


def script_transform(script: Script, dataset: ScriptDataset | None, wanted: TransformConfig) -> AnyTransform | None:
    """The transform that the script brings, or that its dataset makes needless; None for the configuration's.

    `wanted` is that of the configuration.

    Raises:
        UsageError: the function raises, or what it returns is no transform.
    """
    if dataset is not None and dataset.kind.image == "tensor":
        rule = "left out where the dataset yields float Tensors, which are model input"
        require(script.transform is None, "transform", rule, "one", "Leave it out, or yield images.")
        for key, value in wanted.given.items():
            require(False, f"transform.{key}", rule, value, "Leave it out, or yield images.")
        return TensorInput(shape=dataset.kind.shape, example=dataset.kind.example)
    if script.transform is None:
        rule = "one that can be made here"
        require(wanted.name != ITSELF, "transform", rule, ITSELF, "Pass transform= to mgpu_ddp.main in a script.")
        return None
    import torchvision

    try:
        found = script.transform()
    except (Exception, SystemExit) as error:
        raise UsageError(f"transform: the function raised {place_in_code(error)}. Fix it and start again.") from error
    if type(found) is type(torchvision.models.ResNet18_Weights.DEFAULT.transforms()):
        return from_weights(found, found.crop_size[0])
    rule = "a function that returns a transform: a function of an image, or a torchvision preset"
    require(callable(found), "transform", rule, type(found).__name__, "Return one.")
    return TensorInput(shape=shape_of(found), function=found, name=name_of(found))


def shape_of(transform: Callable[[Image.Image], Any]) -> tuple[int, ...]:
    """The shape of what a transform makes of any image.

    Raises:
        UsageError: it raises, or makes no float Tensor (3, H, W), or one of another size for another image.
    """
    shapes, is_random = [], False
    for size in TRIED_SIZES:
        image = Image.effect_noise(size, 64).convert("RGB")
        try:
            made, again = transform(image), transform(image)
        except Exception as error:
            why, pixels = place_in_code(error), f"{size[0]}x{size[1]}"
            raise UsageError(f"transform raised {why} for an image of {pixels}. Fix it and start again.") from error
        is_input = isinstance(made, torch.Tensor) and made.is_floating_point() and made.dim() == 3
        remedy = "End it with ToTensor(), or v2.ToImage() and v2.ToDtype(torch.float32, scale=True)."
        require(is_input, "transform", "a function that returns a float Tensor (3, H, W)", kind_of(made), remedy)
        shapes.append(tuple(made.shape))
        is_random |= not torch.equal(made, again)
    remedy = "Resize or crop to one size: images are predicted in batches."
    rule = "a function that returns Tensors of one shape"
    require(len(set(shapes)) == 1, "transform", rule, " and ".join(map(str, shapes)), remedy)
    if is_random:
        log.warning("the transform is random: rows will differ from one start to the next, and after a resume")
    return shapes[0]
