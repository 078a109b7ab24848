"""The version of this package, and of what its results depend on."""

import ctypes
import platform

from mgpu_ddp import __version__


def version_text() -> str:
    """One line of names and versions."""
    # Only now: they take seconds.
    import torch
    import torchvision

    parts = {
        "mgpu_ddp": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "CUDA": torch.version.cuda or "none",
        "nvJPEG": _nvjpeg_version() or "none",
    }
    return ", ".join(f"{name} {version}" for name, version in parts.items())


def _nvjpeg_version() -> str:
    """The version of the library that decodes on the GPU; empty where there is none."""
    from mgpu_ddp.preprocess.nvjpeg import library

    found, number = library(), ctypes.c_int()
    if found is None:
        return ""
    # Source: nvJPEG's documentation, nvjpegGetProperty; 0, 1 and 2 are MAJOR_VERSION, MINOR_VERSION and PATCH_LEVEL.
    numbers = []
    for which in range(3):
        found.nvjpegGetProperty(which, ctypes.byref(number))
        numbers.append(str(number.value))
    return ".".join(numbers)
