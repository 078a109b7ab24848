"""Run a vision model over a pile of images on every GPU there is: one row per image, exactly once."""

import importlib
import os
from typing import TYPE_CHECKING, Any

from mgpu_ddp.distributed.signals import die_with_parent

if TYPE_CHECKING:
    from mgpu_ddp.boxes import boxes_to_source as boxes_to_source
    from mgpu_ddp.notebook import predict as predict
    from mgpu_ddp.program import main as main
    from mgpu_ddp.run import Run as Run
    from mgpu_ddp.run import open as open  # noqa: A004

__version__ = "0.1.0"

PUBLIC = {
    "Run": "mgpu_ddp.run",
    "boxes_to_source": "mgpu_ddp.boxes",
    "main": "mgpu_ddp.program",
    "open": "mgpu_ddp.run",
    "predict": "mgpu_ddp.notebook",
}
"""The public names, each with the module that is imported once it is asked for."""
__all__ = ["Run", "boxes_to_source", "main", "open", "predict"]

if "TORCHELASTIC_RUN_ID" in os.environ:
    # A worker of torchrun. At once, before the seconds of imports in which torchrun may die unnoticed.
    die_with_parent(os.getppid())


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'mgpu_ddp' has no attribute {name!r}")
    return getattr(importlib.import_module(PUBLIC[name]), name)
