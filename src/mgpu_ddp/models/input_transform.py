"""Chooses how images become a model's input: a named transform or the weights' own, and what keys replace of it."""

import logging
import math
from dataclasses import replace
from typing import Any

from mgpu_ddp.config.checks import require
from mgpu_ddp.config.schema import ArrayConfig, Config, ModelConfig, TransformConfig
from mgpu_ddp.data.array import open_array
from mgpu_ddp.models.checkpoint import is_checkpoint
from mgpu_ddp.models.model import Model
from mgpu_ddp.preprocess.transform import MAX_RESIZED_PIXELS, AnyTransform, Transform, from_weights, imagenet, plain

log = logging.getLogger("mgpu_ddp")

STANDARD_SIZE = 224
"""`transform.size` as it comes: stands for a model's own size."""


def choose_transform(config: Config, model: Model, own: AnyTransform | None = None) -> AnyTransform:
    """`transform` with auto decided: see `TransformConfig`; `own` is the script's.

    Raises:
        UsageError: keys contradict each other.
    """
    if own is not None:
        return own
    wanted = config.transform
    name, named = _named(config, model)
    chosen = _replaced(named, wanted.given)
    if _is_stored_so(config, chosen):
        chosen = replace(chosen, resize=chosen.out_size, crop=None)
    _check(chosen, wanted)
    sizes_given = "resize" in wanted.given and ("crop" in wanted.given or named.crop is None)
    rule = "left out where other keys say all of its sizes"
    require(not sizes_given or wanted.size == STANDARD_SIZE, "transform.size", rule, wanted.size, "Leave it out.")
    if wanted.given:
        keys = ", ".join(f"transform.{key}" for key in wanted.given)
        log.info("%s (%s) but for %s", name, named, keys)
    return chosen


def _is_stored_so(config: Config, chosen: Transform) -> bool:
    """Tell an array whose images have the model's size already."""
    data, wanted = config.data, config.transform
    if not isinstance(data, ArrayConfig) or wanted.name != "auto" or "resize" in wanted.given or chosen.crop is None:
        return False
    return chosen.out_size == open_array(data.path).shape[1:3]


def _named(config: Config, model: Model) -> tuple[str, Transform]:
    """The transform without the keys that replace something of it, and what it is called."""
    name, size = config.transform.name, config.transform.size
    if name == "plain" or (name == "auto" and config.data.name == "fake"):
        own_size = model.input_size if size == STANDARD_SIZE else None
        return "transform=plain", plain(own_size or size)
    if name == "auto" and model.preset is not None:
        return "the weights' own transform", from_weights(model.preset, size)
    if name == "auto" and isinstance(config.model, ModelConfig) and is_checkpoint(config.model.weights):
        log.info(
            "a checkpoint does not say how its images were prepared: ImageNet's way, unless transform.* says another"
        )
    return "transform=imagenet", imagenet(size)


def _replaced(named: Transform, given: dict[str, Any]) -> Transform:
    """The transform with other values, as `TransformConfig` holds them."""
    values = dict(given)
    if "resize" in values:
        resize = values["resize"]
        values["resize"] = tuple(resize) if isinstance(resize, list) else (resize,)
    if isinstance(values.get("crop"), list):
        height, width = values["crop"]
        values["crop"] = height if height == width else (height, width)
    if "mean" in values or "std" in values:
        values["mean"] = tuple(values.get("mean") or named.mean or (0.0, 0.0, 0.0))
        values["std"] = tuple(values.get("std") or named.std or (1.0, 1.0, 1.0))
    return replace(named, **values)


def _check(chosen: Transform, wanted: TransformConfig) -> None:
    """Check that all images come out in one size, which lies within what they are resized to."""
    resize, given = chosen.resize, wanted.given
    if len(resize) == 1:
        key = "transform.resize" if "resize" in given else "transform.size"
        is_small = resize[0] ** 2 <= MAX_RESIZED_PIXELS
        rule = f"such that resized squares have at most {MAX_RESIZED_PIXELS:,} pixels"
        require(is_small, key, rule, given.get("resize", wanted.size), "Lower it.")
        if chosen.crop is None and "resize" in given:
            remedy = "Give transform.crop as well, or both sides."
            require(False, key, "[height,width] where nothing is cropped", wanted.resize, remedy)
        rule = "a size where the shorter side alone is resized"
        require(chosen.crop is not None, "transform.crop", rule, None, "Give transform.resize=[HEIGHT,WIDTH] as well.")
    elif "resize" in given:
        rule = f"at most {MAX_RESIZED_PIXELS:,} pixels"
        require(math.prod(resize) <= MAX_RESIZED_PIXELS, "transform.resize", rule, wanted.resize, "Lower it.")
    if chosen.crop is None or not {"resize", "crop"} & given.keys():
        return
    height, width = chosen.out_size
    # The shorter side may be either.
    fits = max(height, width) <= resize[0] if len(resize) == 1 else height <= resize[0] and width <= resize[1]
    if "crop" in given:
        rule = f"within the resized image ({'shorter side ' * (len(resize) == 1)}{'x'.join(map(str, resize))})"
        require(fits, "transform.crop", rule, wanted.crop, "Raise transform.resize, or crop less.")
    rule = f"at least the crop, {height}x{width}"
    require(fits, "transform.resize", rule, wanted.resize, "Raise it, or give transform.crop (null: none) as well.")
