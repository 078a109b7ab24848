"""Files of class embeddings, and what they mean by the plain computation."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

NAMES = ("a cat", "a dog", "neither")
Classes = dict[str, torch.Tensor]


def save_classes(
    path: Path,
    *,
    width: int,
    bias: float | None = None,
    dtype: torch.dtype = torch.float32,
    names: tuple[str, ...] = NAMES,
    seed: int = 0,
) -> tuple[Path, Classes]:
    """Save random embeddings; returns the tensors as well."""
    random = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(len(names), width, generator=random).to(dtype)
    tensors = {"embeddings": embeddings, "logit_scale": torch.tensor(37.5)}
    tensors |= {} if bias is None else {"logit_bias": torch.tensor(bias)}
    save_file(tensors, path, metadata={"names": json.dumps(names)})
    return path, tensors


def plain(features: torch.Tensor, classes: Classes) -> torch.Tensor:
    """The logits, as CLIP's authors compute them."""
    features = features / features.norm(dim=-1, keepdim=True)
    embeddings = classes["embeddings"].float()
    embeddings = embeddings / embeddings.norm(dim=-1, keepdim=True)
    return classes["logit_scale"] * features @ embeddings.T + classes.get("logit_bias", 0)
