"""Images that were decoded before, in one `.npy`, made once and kept for the next time."""

import shutil
from pathlib import Path

from benching.children import ChildFailedError

DISTINCT = 16_000
SIDE = 224


def make_array(path: Path, images: int) -> None:
    """Write noise of `SIDE` by `SIDE` pixels, in blocks that repeat after `DISTINCT` images."""
    import numpy as np

    if path.exists():
        return
    needed, free = images * SIDE * SIDE * 3, shutil.disk_usage(path.parent).free
    if needed > free:
        # A full disk would end the process by SIGBUS.
        raise ChildFailedError(
            f"{path.parent} must have {needed / 1e9:.1f} GB free, got {free / 1e9:.1f}: see --images."
        )
    unfinished = path.with_suffix(".unfinished")
    array = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.uint8, shape=(images, SIDE, SIDE, 3))
    noise = np.random.default_rng(0).integers(0, 256, (min(images, DISTINCT), SIDE, SIDE, 3), dtype=np.uint8)
    for first in range(0, images, len(noise)):
        array[first : first + len(noise)] = noise[: images - first]
    array.flush()
    unfinished.rename(path)
