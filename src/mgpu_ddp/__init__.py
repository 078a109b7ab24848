"""Run a vision model over a pile of images on every GPU there is: one row per image, exactly once."""

import os

from mgpu_ddp.distributed.signals import die_with_parent

__version__ = "0.1.0"

if "TORCHELASTIC_RUN_ID" in os.environ:
    # A worker of torchrun. At once, before the seconds of imports in which torchrun may die unnoticed.
    die_with_parent(os.getppid())
