"""A repository's preprocessor_config.json → the transform that says the same, in the words of torchvision's presets."""

import math
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from mgpu_ddp.config.schema import Config, FakeConfig
from mgpu_ddp.models.checkpoint import in_one_line
from mgpu_ddp.models.hf_config import refused
from mgpu_ddp.preprocess.transform import MAX_RESIZED_PIXELS

MODULES = {
    "Beit": "beit",
    "Bit": "bit",
    "CLIP": "clip",
    "ConvNext": "convnext",
    "DeiT": "deit",
    "DINOv3ViT": "dinov3_vit",
    "EfficientNet": "efficientnet",
    "Levit": "levit",
    "MobileNetV1": "mobilenet_v1",
    "MobileNetV2": "mobilenet_v2",
    "MobileViT": "mobilevit",
    "PoolFormer": "poolformer",
    "Pvt": "pvt",
    "Segformer": "segformer",
    "Siglip": "siglip",
    "ViT": "vit",
}
"""Modules of image processors, by the beginning of their names."""
ENDINGS = ("ImageProcessorFast", "ImageProcessorPil", "ImageProcessor", "FeatureExtractor")
KEYS = (
    *("do_resize", "size", "resample", "default_to_square", "do_center_crop", "crop_size", "crop_pct"),
    *("do_rescale", "rescale_factor", "rescale_offset", "do_normalize", "image_mean", "image_std", "include_top"),
    *("do_flip_channel_order", "do_pad"),
)
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers. Box and Hamming have no counterpart."""
WARPED = 384
"""ConvNeXt's processor crops below this size, and distorts from it on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A transform in the words of torchvision's presets."""

    resize_size: list[int]
    crop_size: list[int]
    interpolation: Any
    """torchvision's InterpolationMode."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    floors: bool = True


def read_preset(values: dict[str, Any] | None, kind: str, name: str, config: Config) -> tuple[Preset | None, bool]:
    """The preset of a repository, None where it is not asked; and True where blue comes before red.

    Raises:
        UsageError: it prepares images in a way that has no counterpart; says which.
    """
    flips_channels = False
    try:
        if values is None:
            raise ValueError("it has none")
        processor = _processor(values, kind)
        flips_channels = bool(getattr(processor, "do_flip_channel_order", False))
        return _preset(processor), flips_channels
    except Exception as error:  # transformers raises all kinds
        wanted = config.transform
        if wanted.name != "auto" or wanted.given or isinstance(config.data, FakeConfig):
            return None, flips_channels
        why = str(error) if type(error) is ValueError else in_one_line(error)
        rule = "one whose preprocessor_config.json resizes, crops and normalises"
        remedy = "Say it by transform=imagenet or transform.* (docs/data.md), or a script of yours (docs/own.md)."
        raise refused(name, rule, why, remedy) from None


def _processor(values: dict[str, Any], model_type: str) -> Any:
    """transformers' own reading of the file, by a class that it is known to have."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    # Old files do not name theirs.
    of_model = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type, {}).get("torchvision")
    kind = values.get("image_processor_type") or values.get("feature_extractor_type") or of_model
    ending = next((each for each in ENDINGS if str(kind).endswith(each)), "")
    prefix = str(kind).removesuffix(ending)
    # ConvNextFeatureExtractor was spelled so once.
    prefix = "ConvNext" if prefix == "ConvNeXT" else prefix
    if not ending or prefix not in MODULES:
        raise ValueError(f"its processor is {str(kind)[:100]}")
    package = MODULES[prefix]
    chosen = {key: value for key, value in values.items() if key in KEYS and value is not None}
    if prefix == "DINOv3ViT":
        classes = import_module(f"transformers.models.{package}.image_processing_{package}")
        return classes.DINOv3ViTImageProcessor(**chosen)
    classes = import_module(f"transformers.models.{package}.image_processing_pil_{package}")
    return getattr(classes, f"{prefix}ImageProcessorPil")(**chosen)


def _preset(processor: Any) -> Preset:
    # Only now: how a process first imports torchvision is for `lazy_dynamo` to say.
    from torchvision.transforms import InterpolationMode

    kind = type(processor).__name__
    resize, crop = _geometry(processor, kind)
    if crop[0] != crop[-1]:
        raise ValueError(f"its images are {crop[0]}x{crop[1]}, no square")
    if not 1 <= crop[0] <= min(resize):
        raise ValueError(f"it crops {crop[0]} of {resize[0]}")
    if max(resize) ** 2 > MAX_RESIZED_PIXELS:
        raise ValueError(f"it resizes to {max(resize)}")
    if processor.resample not in RESAMPLING:
        raise ValueError(f"it resamples by {processor.resample}")
    if getattr(processor, "do_pad", False):
        raise ValueError("it pads")
    mean, std = _statistics(processor)
    return Preset(
        resize_size=resize,
        crop_size=crop[:1],
        interpolation=InterpolationMode(RESAMPLING[processor.resample]),
        mean=mean,
        std=std,
    )


def _geometry(processor: Any, kind: str) -> tuple[list[int], list[int]]:
    """Sides to resize to, [shorter] or [height, width], and [height, width] that are left."""
    if not processor.do_resize:
        raise ValueError("it does not resize")
    size = {side: value for side, value in dict(processor.size).items() if value is not None}
    if set(size) not in ({"shortest_edge"}, {"height", "width"}):
        raise ValueError(f"its size is {size}")
    both = [size[side] for side in ("height", "width")] if "height" in size else []
    shorter = size.get("shortest_edge", 0)
    if kind.startswith("ConvNext"):
        return ([int(shorter / processor.crop_pct)] if shorter < WARPED else [shorter] * 2), [shorter] * 2
    if kind.startswith("Levit") and shorter:
        shorter = int(256 / 224 * shorter)
    if kind.startswith("PoolFormer"):
        shorter, both = int((shorter or both[0]) / processor.crop_pct), []
    if processor.do_center_crop:
        cropped = dict(processor.crop_size)
        return both or [shorter], [cropped["height"], cropped["width"]]
    if not both:
        raise ValueError("it resizes the shorter side and does not crop")
    return both, both


def _statistics(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation for values of 0 to 1, whatever values the file's own are for."""
    scale = processor.rescale_factor * 255 if processor.do_rescale else 255.0
    # Such as 0.00392156862745098, which is not 1/255 to the last bit.
    scale = 1.0 if math.isclose(scale, 1) else scale
    offset = 1.0 if processor.do_rescale and getattr(processor, "rescale_offset", False) else 0.0
    means, stds = ([0.0] * 3, [1.0] * 3)
    if processor.do_normalize:
        means, stds = list(processor.image_mean), list(processor.image_std)
    again = list(processor.image_std) if getattr(processor, "include_top", False) else [1.0] * 3
    mean = tuple((mean + offset) / scale for mean in means)
    std = tuple(std * other / scale for std, other in zip(stds, again, strict=True))
    if len(mean) != 3 or not all(math.isfinite(each) for each in (*mean, *std)) or min(std) <= 0:
        raise ValueError(f"its mean and std are {means} and {stds}")
    return mean, std
