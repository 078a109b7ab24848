"""JPEGs of the size of ImageNet's, the same ones on every machine, made on all cores and kept for the next time."""

import io
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 500, 375
QUALITY = 90
PER_FOLDER, PER_TASK = 1000, 100
OCTAVES = ((12, 160.0), (60, 64.0), (250, 33.0))
"""Columns of noise and its span in levels, coarse to fine: what yields about 55 kB at `QUALITY`."""


def work_folder(named: Path | None) -> Path:
    """Where images are kept for the next time."""
    folder = named or Path(tempfile.gettempdir()) / f"mgpu_ddp-bench-{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def make_folder(work: Path, *, images: int, distinct: int) -> tuple[Path, float]:
    """Make a folder of `images` JPEGs, `distinct` of them different: the folder, and the mean bytes of a file.

    Below are numbered folders of `PER_FOLDER` files, as torchvision's ImageFolder likes them. File i is number
    i % distinct; all after the first `distinct` are hard links, since decoding is what is to be repeated, not disk
    space. No two in a batch are the same.
    """
    distinct = min(distinct, images)
    different = work / f"distinct-{distinct}"
    if not different.exists():
        fill(different, distinct, _Make())
    folder = work / f"images-{images}-of-{distinct}"
    if not folder.exists():
        fill(folder, images, _Link(different, distinct))
    sizes = [name_of(different, number).stat().st_size for number in range(distinct)]
    return folder, sum(sizes) / distinct


class _Make:
    """Write one JPEG."""

    def __call__(self, path: Path, number: int) -> None:
        path.write_bytes(jpeg(number))


class _Link:
    """Link one JPEG to its original."""

    def __init__(self, different: Path, distinct: int) -> None:
        self._different, self._distinct = different, distinct

    def __call__(self, path: Path, number: int) -> None:
        os.link(name_of(self._different, number % self._distinct), path)


def fill(folder: Path, count: int, make: Callable[[Path, int], None], *, per_folder: int = PER_FOLDER) -> None:
    """Fill a folder beside its place and move it there, so that one that is there is whole."""
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.unfinished")
    unfinished.mkdir(parents=True)
    try:
        for first in range(0, count, per_folder):
            name_of(unfinished, first, per_folder).parent.mkdir()
        numbers = [range(first, min(first + PER_TASK, count)) for first in range(0, count, PER_TASK)]
        tasks = [(unfinished, some, make, per_folder) for some in numbers]
        with multiprocessing.get_context("spawn").Pool(len(os.sched_getaffinity(0))) as pool:
            pool.starmap(_fill, tasks, chunksize=1)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _fill(folder: Path, numbers: range, make: Callable[[Path, int], None], per_folder: int) -> None:
    for number in numbers:
        make(name_of(folder, number, per_folder), number)


def name_of(folder: Path, number: int, per_folder: int = PER_FOLDER) -> Path:
    return folder / f"{number // per_folder:04d}" / f"{number:07d}.jpg"


def jpeg(number: int) -> bytes:
    """Make JPEG number `number`: noise of three sizes, which compresses about as photographs do."""
    import numpy as np

    out = io.BytesIO()
    picture(np.random.default_rng(number), WIDTH, HEIGHT).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def picture(random: Any, width: int, height: int, *, grain: float = 0.0) -> Any:
    """An image of noise of three sizes, and of a grain in levels (standard deviation) as a camera's sensor has it."""
    import numpy as np
    from PIL import Image

    pixels = np.full((height, width, 3), 128.0, dtype=np.float32)
    for columns, span in OCTAVES:
        shape = (max(2, columns * height // width), columns, 3)
        noise = Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).resize((width, height))
        pixels += (np.asarray(noise, dtype=np.float32) / 255 - 0.5) * (span * random.uniform(0.7, 1.3))
    if grain:
        pixels += grain * random.standard_normal((height, width, 1), dtype=np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
