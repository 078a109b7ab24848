"""Classes by their embeddings, as the text tower of a CLIP makes them: the file, and the head on an image tower."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from mgpu_ddp.config.checks import require
from mgpu_ddp.config.schema import Config
from mgpu_ddp.data.input_file import open_value
from mgpu_ddp.distributed.host import available_bytes, require_memory
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import UsageError
from mgpu_ddp.models.checkpoint import in_one_line
from mgpu_ddp.models.class_names import check_names
from mgpu_ddp.models.head import embedding_dim, head_of
from mgpu_ddp.models.model import Model

KEY = "model.zero_shot"
REMEDY = "Make it as docs/models.md says."
EMBEDDINGS, SCALE, BIAS = "embeddings", "logit_scale", "logit_bias"
DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroShot:
    """The content of a file; on other ranks than 0 its tensors are still empty."""

    names: tuple[str, ...]
    digest: str
    """sha256 of the file."""
    embeddings: torch.Tensor
    """fp32 (classes, width), each of length one."""
    scale: torch.Tensor
    """fp32 scalars: the logits are the cosines times `scale`, plus `bias`."""
    bias: torch.Tensor

    @property
    def width(self) -> int:
        return self.embeddings.shape[1]


class CosineHead(nn.Linear):
    """Features (B, width) → logits (B, classes): scaled cosines, in fp32 whatever the dtype of the features.

    A linear layer, so that it is found as the head of the model.
    """

    logit_scale: torch.Tensor
    logit_bias: torch.Tensor

    def __init__(self, classes: ZeroShot) -> None:
        super().__init__(classes.width, len(classes.names), bias=False, device="meta")
        del self.weight
        # No weights of the model's: the manifest names the file beside them.
        self.register_buffer("weight", classes.embeddings, persistent=False)
        self.register_buffer(SCALE, classes.scale, persistent=False)
        self.register_buffer(BIAS, classes.bias, persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # The head moves with the model, and keeps its dtype.
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)
        return self

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        directions = nn.functional.normalize(features.float(), dim=1)
        return nn.functional.linear(self.logit_scale * directions, self.weight) + self.logit_bias


class ZeroShotClassifier(nn.Module):
    """An image tower, and the classes that its features are compared with."""

    def __init__(self, tower: nn.Module, classes: ZeroShot) -> None:
        super().__init__()
        self.tower, self.head = tower, CosineHead(classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.tower(images))
        return logits


def open_zero_shot(config: Config, world: World) -> ZeroShot | None:
    """Read the file on rank 0, if one is given. Collective: every rank calls this.

    Raises:
        UsageError: it is missing or damaged, or other keys contradict it.
    """
    wanted, path = config.model, getattr(config.model, "zero_shot", None)
    if path is None:
        return None
    mine: ZeroShot | None = None
    with world.together("read the classes"):
        for key in ("num_classes", "class_names"):
            value, rule = getattr(wanted, key, None), f"null with {KEY}, whose file has the classes"
            require(value is None, f"model.{key}", rule, value, "Leave it out.")
        if world.rank == 0:
            mine = read_zero_shot(Path(path))
    said = world.share("classes", (mine.names, mine.digest, mine.width) if mine is not None else None)
    names, digest, width = said
    one = torch.ones(())
    return mine or ZeroShot(
        names=tuple(names), digest=digest, embeddings=torch.empty(len(names), width), scale=one, bias=one.clone()
    )


def read_zero_shot(path: Path) -> ZeroShot:
    """Read class embeddings and names.

    Raises:
        UsageError: there is no such file, or it holds something else.
    """
    from safetensors import safe_open

    with open_value(KEY, path) as file:
        # In half precision it takes twice as much, and once more while lengths are made one.
        num_bytes = 4 * os.fstat(file.fileno()).st_size
    require_memory(KEY, str(path), num_bytes, available_bytes(), "Give fewer classes.")
    try:
        with safe_open(path, framework="pt") as opened:
            shapes = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            kinds = {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in shapes.items()}
            names = (opened.metadata() or {}).get("names")
            num_classes = _check_kinds(kinds, path)
            tensors = {key: opened.get_tensor(key).float() for key in kinds}
    except UsageError:
        raise
    except Exception as error:  # safetensors' own, and OSError
        raise UsageError(f"{KEY} must be a safetensors, got {str(path)!r} ({in_one_line(error)}). {REMEDY}") from None
    names = _check_names(names, num_classes, path)
    _check_numbers(tensors, names, path)
    with open_value(KEY, path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ZeroShot(
        names=names,
        digest=digest,
        embeddings=nn.functional.normalize(tensors[EMBEDDINGS], dim=1),
        scale=tensors[SCALE].reshape(()),
        bias=tensors.get(BIAS, torch.zeros(())).reshape(()),
    )


def _check_kinds(kinds: dict[str, tuple[str, tuple[int, ...]]], path: Path) -> int:
    """Check the tensors before one is read. Returns the number of classes."""
    found = ", ".join(f"{key} {dtype} {shape}" for key, (dtype, shape) in sorted(kinds.items())[:4]) or "nothing"
    rule = f"a file of the tensors {EMBEDDINGS} (classes, width), {SCALE} and, where there is one, {BIAS}"
    require({EMBEDDINGS, SCALE} <= kinds.keys() <= {EMBEDDINGS, SCALE, BIAS}, KEY, rule, f"{path} with {found}", REMEDY)
    ok = all(dtype in DTYPES for dtype, _ in kinds.values())
    require(ok, KEY, f"a file of {', '.join(DTYPES)}", f"{path} with {found}", REMEDY)
    shape, scalars = kinds[EMBEDDINGS][1], [shape for key, (_, shape) in kinds.items() if key != EMBEDDINGS]
    ok = len(shape) == 2 and shape[0] >= 2 and shape[1] >= 1 and all(scalar in ((), (1,)) for scalar in scalars)
    require(ok, KEY, f"a file of {EMBEDDINGS} of at least two classes, and scalars", f"{path} with {found}", REMEDY)
    return shape[0]


def _check_names(text: str | None, num_classes: int, path: Path) -> tuple[str, ...]:
    try:
        names: Any = json.loads(text or "null")
    except (ValueError, RecursionError):
        names = None
    checked = check_names(KEY, names, num_classes, path, "Save them as a JSON list in the metadata 'names'.")
    twice = [name for name, count in Counter(checked).items() if count > 1]
    found = f"{path} with {twice[0]!r} more than once" if twice else ""
    require(not twice, KEY, "a file of names that differ", found, "Rename one of them.")
    return checked


def _check_numbers(tensors: dict[str, torch.Tensor], names: tuple[str, ...], path: Path) -> None:
    embeddings = tensors[EMBEDDINGS]
    lengths = embeddings.norm(dim=1)
    bad = (~(lengths.isfinite() & (lengths > 0))).nonzero().flatten().tolist()
    found = f"{path} with NaN, Inf or zeros alone for {names[bad[0]]!r}" if bad else ""
    require(not bad, KEY, "a file of directions", found, REMEDY)
    scale = float(tensors[SCALE])
    remedy = "Save the factor of the cosines, such as 100: of CLIP's parameter of that name the exponential."
    require(0 < scale < float("inf"), KEY, f"a file whose {SCALE} is above 0", f"{path} with {scale}", remedy)
    bias = float(tensors.get(BIAS, torch.zeros(())))
    require(bias - bias == 0, KEY, f"a file whose {BIAS} is a number", f"{path} with {bias}", REMEDY)


def classify(model: Model, classes: ZeroShot, path: str) -> Model:
    """Turn a model whose weights are loaded into a classifier of these classes.

    The features are what it returns where that has the width of the embeddings, as the projection of an image tower
    has; else what its classifier sees, which is taken off.

    Raises:
        UsageError: neither has that width.
    """
    tower, returned, seen = model.module, model.num_features or model.num_classes, None
    if model.num_classes is not None and model.has_embedding:
        seen = embedding_dim(tower, model.num_classes)
    if returned != classes.width:
        widths = f"{returned}, which the model returns" + (f", or {seen}, which its classifier sees" if seen else "")
        remedy = "Make it with the text tower of this very model (docs/models.md)."
        require(seen == classes.width, KEY, f"a file of width {widths}", f"{path} of {classes.width}", remedy)
        assert model.num_classes is not None
        head = head_of(tower, model.num_classes)
        name = next(name for name, part in tower.named_modules() if part is head)
        tower.set_submodule(name, nn.Identity())
    return replace(
        model,
        module=ZeroShotClassifier(tower, classes),
        num_classes=len(classes.names),
        num_features=None,
        class_names=classes.names,
        identity={**model.identity, KEY: classes.digest},
        origin=f"{model.origin}, with {len(classes.names):,} classes of {path}",
    )
