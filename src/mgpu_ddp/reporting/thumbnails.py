"""Small copies of samples' images."""

import base64
import io
import logging
import os
import time
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mgpu_ddp.config.schema import GROUPS, Config, ModelConfig, TransformConfig
from mgpu_ddp.data.datasets import open_samples
from mgpu_ddp.data.listing import FILE_NAME, Listing
from mgpu_ddp.data.samples import Samples
from mgpu_ddp.errors import UsageError
from mgpu_ddp.output.manifest import Manifest
from mgpu_ddp.preprocess.transform import AnyTransform, Pixels, TensorInput, Transform, decode, to_rgb, upright

log = logging.getLogger("mgpu_ddp")

PIXELS = 128
MAX_CHARACTERS = 1_200_000
"""Bytes that all thumbnails of a page may take."""
MAX_THREADS = 4


def reopen_samples(run_dir: Path, manifest: Manifest) -> Samples | None:
    """Open the samples that a finished job predicted. Returns None where they are gone."""
    job = manifest.fingerprint
    try:
        values = {key.removeprefix("data."): value for key, value in job.items() if key.startswith("data.")}
        option = GROUPS["data"][job["data.name"]]
        config = Config(data=option(**values), transform=TransformConfig(), model=ModelConfig())
        files = Listing.open(run_dir / FILE_NAME) if (run_dir / FILE_NAME).exists() else None
        return open_samples(config, files)
    except (UsageError, OSError) as error:
        log.warning("no thumbnails: %s", error)
        return None


def make_thumbnails(
    samples: Samples, indices: Iterable[int], manifest: Manifest, deadline: float
) -> tuple[dict[int, str | None], int]:
    """Make small copies of images, reading none after `deadline`, by `time.monotonic`.

    Returns data URIs by index, None for an image that can no longer be read; and how many images were left out, for
    lack of time or because the page would become too large.
    """
    wanted = list(dict.fromkeys(indices))
    transform = _transform_of(manifest)
    found: dict[int, str | None] = {}
    characters = 0
    threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    # Set once for all threads, because `decode` does so for itself alone, which other threads would undo.
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")
        for first in range(0, len(wanted), threads):
            if time.monotonic() >= deadline:
                break
            some = wanted[first : first + threads]
            images = [_read(samples, index, transform) for index in some]
            for index, uri in zip(some, pool.map(_thumbnail, some, images), strict=True):
                characters += len(uri or "")
                if characters > MAX_CHARACTERS:
                    return found, len(wanted) - len(found)
                found[index] = uri
    return found, len(wanted) - len(found)


def _transform_of(manifest: Manifest) -> AnyTransform:
    """A transform that keeps all of an image, or takes the model input that a dataset yields as it is."""
    job = manifest.fingerprint
    if job.get("transform.name") == "script" and job.get("transform.function") is None:
        return TensorInput(shape=tuple(job.get("transform.shape", ())))
    return _Whole(resize=(PIXELS,))


class _Whole(Transform):
    """Leaves an image as it is."""

    def geometry(self, image: Image.Image) -> Pixels:
        return np.asarray(image)

    def of_pixels(self, pixels: Pixels) -> Pixels:
        return pixels


def _no_clock(_stage: str, _spent_s: float) -> None: ...


def _read(samples: Samples, index: int, transform: AnyTransform) -> Image.Image | bytes | Exception:
    try:
        data = None if samples.are_boxes else samples.read(index, _no_clock)
        return _image_of(samples.load(index, transform, _no_clock)[0]) if data is None else data
    except Exception as error:
        return error


def _thumbnail(index: int, image: Image.Image | bytes | Exception) -> str | None:
    try:
        if isinstance(image, Exception):
            raise image
        image = _decode(image) if isinstance(image, bytes) else image
        image.thumbnail((PIXELS, PIXELS))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=75)
    except Exception as error:
        # The row holds its prediction: the image may have gone since.
        log.warning("no thumbnail of row %d: %s", index, error)
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _decode(data: bytes) -> Image.Image:
    if not data.startswith(b"\xff\xd8"):
        return decode(data)
    image = Image.open(io.BytesIO(data), formats=("JPEG",))
    # At an eighth of its size, or so, a photo takes a fraction of the time.
    image.draft("RGB", (2 * PIXELS, 2 * PIXELS))
    return to_rgb(upright(image))


def _image_of(values: npt.NDArray[Any]) -> Image.Image:
    """An image of uint8 (height, width, 3), or of model input (channels, height, width) in its own range of values."""
    if values.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(values))
    if values.ndim != 3 or values.shape[0] not in (1, 3):
        raise ValueError(f"model input of the shape {values.shape} is no picture")
    low, high = values.min(), values.max()
    values = (values - low) * (255 / (high - low) if high > low else 0.0)
    return Image.fromarray(values.astype(np.uint8).transpose(1, 2, 0).repeat(3 // len(values), axis=2))
