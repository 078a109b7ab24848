"""Made-up material: images as bytes, names and rows."""

import io
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from mgpu_ddp.output.rows import Rows


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of a real image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(width: int = 48, height: int = 40, seed: int = 0) -> Image.Image:
    """A smooth RGB image with detail in every channel."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def texts(values: Iterable[str | None]) -> Any:
    """An Arrow array of strings."""
    return pa.array(values, type=pa.string())


def ignore_time(_stage: str, _seconds: float) -> None:
    """A clock that nobody reads."""


def make_rows(
    first: int, count: int, *, errors: dict[int, str] | None = None, classes: int = 3, wide: bool = True
) -> Rows:
    """Rows [first, first + count) with numbers drawn from their index, so that any two calls agree."""
    logits = np.stack([np.random.default_rng(i).standard_normal(classes) for i in range(first, first + count)])
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    best = np.argsort(-probs, axis=1)[:, :2]
    columns: dict[str, Any] = {
        "pred": best[:, 0].astype(np.int32),
        "prob": probs.max(axis=1).astype(np.float32),
        "topk_index": best.astype(np.int32),
        "topk_prob": np.take_along_axis(probs, best, axis=1).astype(np.float32),
    }
    if wide:
        columns["logits"] = logits.astype(np.float32)
    index = np.arange(first, first + count, dtype=np.int64)
    return Rows(index=index, label=(index % 4 - 1).astype(np.int32), columns=columns, errors=errors or {})
