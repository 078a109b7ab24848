"""Run a vision model over a pile of images on every GPU there is: one row per image, exactly once."""

__version__ = "0.1.0"
