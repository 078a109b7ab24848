"""Some of a job's samples, with small copies of their images."""

import base64
import io
import logging
import time
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
from mgpu_ddp.preprocess.transform import Transform
from mgpu_ddp.reporting.class_table import ClassTable
from mgpu_ddp.reporting.table_stats import TableStats

log = logging.getLogger("mgpu_ddp")

THUMBNAILS = 24
THUMBNAIL_PIXELS = 128


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


def samples_shown(
    stats: TableStats, classes: ClassTable, manifest: Manifest, samples: Samples | None, deadline: float
) -> list[dict[str, Any]]:
    """Describe the rows that were picked, reading no image after `deadline`, by `time.monotonic`."""
    transform = _transform_of(manifest)
    shown = []
    for row in stats.picked:
        failed, thumbnail = row.failed, None
        if samples is not None and transform is not None and not failed and time.monotonic() < deadline:
            thumbnail = _thumbnail(samples, transform, row.index)
        shown.append(
            {
                "name": (samples.path(row.index) if samples is not None else None) or f"sample {row.index}",
                "thumbnail": thumbnail,
                "failed": failed,
                "class_name": classes.name(row.pred) if row.pred >= 0 else None,
                "prob": row.prob,
                "label": classes.label_name(row.label) if row.label >= 0 else None,
            }
        )
    return shown


def _transform_of(manifest: Manifest) -> Transform | None:
    """The transform of the job, None for a folder that does not know it."""
    found = {k.removeprefix("transform."): v for k, v in manifest.fingerprint.items() if k.startswith("transform.")}
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
    try:
        return Transform(**values)
    except TypeError:
        return None


def _thumbnail(samples: Samples, transform: Transform, index: int) -> str | None:
    """A small copy of an image as a data URI, None where it can no longer be read."""
    try:
        pixels, _ = samples.load(index, transform, lambda stage, spent_s: None)
    except Exception as error:
        # The row holds its prediction: the image may have gone since.
        log.warning("no thumbnail of row %d: %s", index, error)
        return None
    return _jpeg_uri(pixels)


def _jpeg_uri(pixels: npt.NDArray[np.uint8]) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=75)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
