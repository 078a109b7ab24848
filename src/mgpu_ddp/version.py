"""The version of this package, and of what its results depend on."""

import platform

from mgpu_ddp import __version__


def version_text() -> str:
    """One line of names and versions."""
    # Only now: they take seconds.
    import torch
    import torchvision

    from mgpu_ddp.preprocess.nvjpeg import library_version

    parts = {
        "mgpu_ddp": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "CUDA": torch.version.cuda or "none",
        "nvJPEG": library_version() or "none",
    }
    return ", ".join(f"{name} {version}" for name, version in parts.items())
