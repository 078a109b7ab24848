"""Repositories of tiny random models, as transformers itself saves them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

NAMES = tuple(f"kind {i}" for i in range(5))
SIDE = 64
VIT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 36,
    "image_size": SIDE,
    "patch_size": 8,
}
SWIN = {"image_size": SIDE, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
DINO = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8}
TEXTS = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 9}
TINY: dict[str, dict[str, Any]] = {
    "beit": VIT | {"use_relative_position_bias": True},
    "bit": {"embedding_size": 8, "hidden_sizes": [32, 32], "depths": [1, 1], "num_groups": 4},
    "clip": {"vision_config": VIT, "text_config": TEXTS, "projection_dim": 20},
    "clip_vision_model": VIT | {"projection_dim": 20},
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2},
    "convnextv2": {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2},
    "cvt": {"embed_dim": [8, 16, 24], "num_heads": [1, 2, 2], "depth": [1, 2, 3], "drop_path_rate": [0.0, 0.0, 0.0]},
    "data2vec-vision": VIT,
    "deit": VIT,
    "dinov2": DINO | {"use_swiglu_ffn": True},
    "dinov2_with_registers": DINO,
    "dinov3_convnext": {"hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 2, 1]},
    "dinov3_vit": VIT | {"num_register_tokens": 2},
    "efficientnet": {
        "width_coefficient": 0.25,
        "depth_coefficient": 0.25,
        "hidden_dim": 320,
        "image_size": SIDE,
        "in_channels": [32, 16],
        "out_channels": [16, 320],
        "kernel_sizes": [3, 5],
        "strides": [1, 2],
        "num_block_repeats": [1, 2],
        "expand_ratios": [1, 6],
    },
    "focalnet": {"image_size": SIDE, "embed_dim": 8, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3]},
    "hiera": {"image_size": [SIDE, SIDE], "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "num_query_pool": 1},
    "levit": {
        "image_size": SIDE,
        "hidden_sizes": [16, 24, 32],
        "num_attention_heads": [1, 2, 2],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
    },
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "mobilevit": {"hidden_sizes": [8, 12, 16], "neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 16], "num_attention_heads": 2},
    "mobilevitv2": {"width_multiplier": 0.25},
    "poolformer": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "pvt": {
        "image_size": SIDE,
        "hidden_sizes": [8, 8, 16, 16],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 2, 2],
    },
    "pvt_v2": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]},
    "regnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4},
    "resnet": {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 1]},
    "segformer": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]},
    "siglip": {"vision_config": VIT, "text_config": TEXTS},
    "siglip_vision_model": VIT,
    "swiftformer": {"depths": [1, 1], "embed_dims": [8, 16], "num_encoder_blocks": 2},
    "swin": SWIN,
    "swinv2": SWIN,
    "vit": VIT,
    "vit_msn": VIT,
}
"""Settings of a small model, by type."""
TOWERS = {"clip_vision_model": "CLIPVisionModelWithProjection", "siglip_vision_model": "SiglipVisionModel"}


def save_model(folder: Path, kind: str, architecture: str, **settings: Any) -> Any:
    """Save a model and its image processor into a folder, and return it as it is without."""
    labels = {"id2label": dict(enumerate(NAMES)), "num_labels": len(NAMES)}
    config = transformers.CONFIG_MAPPING[kind](**TINY[kind] | labels | settings)
    torch.manual_seed(7)
    model = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                # Zeros and ones, as many begin, would hide one that was left out or taken for another.
                spread = torch.randn_like(tensor) / max(1, tensor[0].numel()) ** 0.5 if tensor.dim() > 1 else 0.1
                tensor.copy_(tensor + spread * torch.rand_like(tensor))
    model.save_pretrained(folder)
    return model


def processor_of(kind: str) -> Any:
    """transformers' image processor of a type, by Pillow where it has that."""
    names = IMAGE_PROCESSOR_MAPPING_NAMES[kind]
    return getattr(transformers, names.get("pil") or names["torchvision"])


def classifier_of(kind: str) -> str | None:
    """The class of a type's classifiers."""
    found = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.get(kind)
    return found[0] if isinstance(found, tuple) else found


def features_of(kind: str) -> str:
    """The class of a type's models without classes."""
    return TOWERS.get(kind) or str(MODEL_MAPPING_NAMES[kind])
