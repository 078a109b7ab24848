"""Run folders for tests: a wanted manifest, claimed folders, and parts with two error rows."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mgpu_ddp.config.schema import FakeConfig
from mgpu_ddp.data.fake import FakeSamples
from mgpu_ddp.data.samples import Samples
from mgpu_ddp.output.folders import LOCK
from mgpu_ddp.output.formats import FORMATS
from mgpu_ddp.output.manifest import Manifest, Part
from mgpu_ddp.output.parts import PartWriter, open_writer
from mgpu_ddp.output.run_folder import RunFolder
from tests.support.samples import make_rows, texts

CLASSES = 3
HOWS = [*FORMATS, "npy"]
FAILED = (3, 17)
"""The samples that `write_parts` makes error rows of."""
REASON = 'ValueError: a "reason", on\ntwo lines ☃'


class Named(FakeSamples):
    """Fake samples with a name each."""

    def path(self, index: int) -> str | None:
        return f"class/{index},\n☃.png"

    def names(self, indices: npt.NDArray[np.int64]) -> Any:
        return texts(self.path(i) for i in indices)


SAMPLES: Samples = Named(FakeConfig(size=20))


def wanted(how: str = "parquet", *, fingerprint: dict[str, Any] | None = None, **changes: Any) -> Manifest:
    """The manifest of a fresh job of 20 samples."""
    keys = {"model.name": "resnet18", "seed": 0, "data.image_size": [3, 8, 8], "output.format": how}
    return Manifest(fingerprint=keys | (fingerprint or {}), **{"start": 0, "stop": 20, "batch_size": 4} | changes)


def claim(
    run_dir: Path, how: str = "parquet", *, manifest: Manifest | None = None, overwrite: bool = False, **changes: Any
) -> RunFolder:
    """Claim a folder as a job does, and let go of it."""
    settings: dict[str, Any] = {"resume": True, "batch_size_given": False}
    with RunFolder.place(run_dir, overwrite=overwrite) as folder:
        columns = CLASSES if how == "npy" else None
        folder.claim(
            manifest or wanted(how), None, array_shape=None if columns is None else (columns,), **settings | changes
        )
    return folder


def writer_of(folder: RunFolder, token: str = "t") -> PartWriter:
    manifest = folder.claimed
    return open_writer(folder.path, manifest.output_format, SAMPLES.names, None, token, manifest.start)


def write_parts(folder: RunFolder, *stops: int, token: str = "t") -> list[Part]:
    """Write and commit parts from the prefix to each stop."""
    writer = writer_of(folder, token)
    parts = []
    for stop in stops:
        first = folder.claimed.prefix
        errors = {i: f"{REASON} {i}" for i in FAILED if first <= i < stop}
        parts.append(writer.write(make_rows(first, stop - first, errors=errors, classes=CLASSES)))
        folder.open_table(writer).list(parts[-1:])
    return parts


def files_below(folder: Path) -> set[str]:
    """The files of a folder, besides its lock."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)) for path in paths if path.name != LOCK}
