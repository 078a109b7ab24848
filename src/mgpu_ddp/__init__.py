"""Run a vision model over a pile of images on every GPU there is: one row per image, exactly once."""

import os

__version__ = "0.1.0"
PARENT = os.getppid()
"""Who started this process, asked before the seconds of imports in which a launcher may die unnoticed."""
