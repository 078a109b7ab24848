"""`report.html`: one page to look at after a job, made from its run folder alone.

Rank 0 writes it at the end of a job; `python -m mgpu_ddp.report run=DIR` makes it again, and that of a sweep.
"""

import base64
import io
import json
import logging
import time
from pathlib import Path
from typing import Any

from PIL import Image

from mgpu_ddp.config.schema import GROUPS, Config, ModelConfig, TransformConfig
from mgpu_ddp.data.datasets import open_samples
from mgpu_ddp.data.listing import FILE_NAME, Listing
from mgpu_ddp.data.samples import Samples
from mgpu_ddp.errors import UsageError
from mgpu_ddp.output.atomic_files import replace_bytes
from mgpu_ddp.output.manifest import Manifest
from mgpu_ddp.preprocess.transform import Transform
from mgpu_ddp.reporting import page_sections
from mgpu_ddp.reporting.class_table import Classes
from mgpu_ddp.reporting.markup import Html, document, foreign, joined, tag, void
from mgpu_ddp.reporting.table_stats import Picked, Tally

log = logging.getLogger("mgpu_ddp")

PAGE = "report.html"
THUMBNAILS = 24
THUMBNAIL_PIXELS = 128
THUMBNAILS_S = 2.0
"""A job reads no further image after so many seconds."""


def samples_of(run_dir: Path, manifest: Manifest) -> Samples | None:
    """The samples that a job predicted, None where they are gone."""
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


def write_page(
    run_dir: Path, manifest: Manifest, classes: Classes, counted: Tally, samples: Samples | None, *, home: Path
) -> None:
    """Write `report.html`. The table is proved by now: what fails here is said, and ends no job. Rank 0 only."""
    try:
        write(run_dir, manifest, classes, counted, samples, home=home, thumbnails_s=THUMBNAILS_S)
    except Exception as error:
        log.warning("%s could not be made (%s: %s)", run_dir / PAGE, type(error).__name__, error)


def write(
    run_dir: Path,
    manifest: Manifest,
    classes: Classes,
    counted: Tally,
    samples: Samples | None,
    *,
    home: Path,
    thumbnails_s: float,
) -> Path:
    status, metrics = _json(run_dir / "status.json"), _json(run_dir / "metrics.json")
    content = [
        page_sections.summary(manifest, counted, status, metrics, home),
        page_sections.throughput(metrics),
        page_sections.stages(metrics),
        page_sections.accuracy(counted, classes),
        page_sections.classes(counted, classes),
        _thumbnails(counted, classes, manifest, samples, time.monotonic() + thumbnails_s),
        page_sections.errors(run_dir, manifest),
        page_sections.where(manifest, metrics),
    ]
    text = document(f"{manifest.fingerprint.get('model.name')} · {home.name}", *content)
    replace_bytes(run_dir / PAGE, text.encode())
    return run_dir / PAGE


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path} must be readable, got {type(error).__name__}. Start the job again.") from None


def _thumbnails(counted: Tally, classes: Classes, manifest: Manifest, samples: Samples | None, until: float) -> Html:
    if not counted.picked:
        return Html()
    transform = _transform(manifest)
    figures = []
    for row in counted.picked:
        picture = None
        if samples is not None and transform is not None and row.pred >= 0 and time.monotonic() < until:
            picture = _thumbnail(samples, transform, row)
        name = (samples.path(row.index) if samples is not None else None) or f"sample {row.index}"
        said = tag("b", foreign(classes.name(row.pred)), f" {row.prob:.1%}") if row.pred >= 0 else tag("b", "error")
        label = [void("br"), "label ", foreign(classes.label_name(row.label))] if row.label >= 0 else []
        image = picture or tag("span", class_="none")
        figures.append(
            tag("figure", image, said, *label, void("br"), tag("span", foreign(name), class_="soft"), class_="thumb")
        )
    return joined(
        [
            tag("h2", "Samples"),
            tag("p", "Evenly spread over the rows, as the model sees them.", class_="soft"),
            tag("div", *figures, class_="thumbs"),
        ]
    )


def _transform(manifest: Manifest) -> Transform | None:
    """The transform of the job, None for a folder that does not know it."""
    found = {k.removeprefix("transform."): v for k, v in manifest.fingerprint.items() if k.startswith("transform.")}
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
    try:
        return Transform(**values)
    except TypeError:
        return None


def _thumbnail(samples: Samples, transform: Transform, row: Picked) -> Html | None:
    try:
        pixels, _ = samples.load(row.index, transform, lambda stage, spent_s: None)
    except Exception as error:
        # The row holds its prediction: the image may have gone since.
        log.warning("no thumbnail of row %d: %s", row.index, error)
        return None
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=75)
    return void("img", alt="", src=f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}")
