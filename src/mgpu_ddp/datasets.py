"""Names of datasets → samples that a loader worker can read one by one."""

import logging
import os
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from mgpu_ddp import listing
from mgpu_ddp.arrays import ArraySamples
from mgpu_ddp.config import ArrayConfig, Config, FakeConfig, FolderConfig
from mgpu_ddp.errors import UsageError
from mgpu_ddp.listing import Listing
from mgpu_ddp.manifest import Manifest
from mgpu_ddp.preprocess import Pixels, StageClock, Transform, decode
from mgpu_ddp.world import World

log = logging.getLogger("mgpu_ddp")


class Samples(Protocol):
    """A dataset of images: any index from 0 to len - 1, in any order, from any process."""

    def __len__(self) -> int: ...

    def read(self, index: int, clock: StageClock) -> bytes | None:
        """The content of a sample's file, None where it has none."""
        ...

    def load(
        self, index: int, transform: Transform, clock: StageClock, data: bytes | None = None
    ) -> tuple[Pixels, int]:
        """One image as uint8 (height, width, 3) after the transform's geometry, and its label or -1.

        `data` is the file's content where it was read already.
        """
        ...

    def known_label(self, index: int) -> int:
        """The label as far as it is known without reading the image, or -1."""
        ...

    def path(self, index: int) -> str | None:
        """The name that a row carries."""
        ...


class FakeSamples:
    """torchvision's FakeData, bit for bit, without its detour through PIL and the global random state.

    Source: torchvision.datasets.FakeData and transforms.functional.to_pil_image.
    """

    def __init__(self, config: FakeConfig) -> None:
        self._config = config
        self._generator = torch.Generator()
        self._noise = torch.empty(config.image_size)

    def __len__(self) -> int:
        return self._config.size

    def read(self, index: int, clock: StageClock) -> bytes | None:
        return None

    def load(
        self, index: int, transform: Transform, clock: StageClock, data: bytes | None = None
    ) -> tuple[Pixels, int]:
        started = time.perf_counter()
        self._generator.manual_seed(index + self._config.random_offset)
        torch.randn(self._config.image_size, generator=self._generator, out=self._noise)
        label = int(torch.randint(0, self._config.num_classes, (1,), generator=self._generator))
        pixels = self._noise.mul_(255).byte().permute(1, 2, 0).expand(-1, -1, 3).numpy()
        generated = time.perf_counter()
        clock("generate", generated - started)
        if transform.crop is not None or transform.resize != pixels.shape[:2]:
            pixels = transform.geometry(Image.fromarray(np.ascontiguousarray(pixels)))
            clock("resize", time.perf_counter() - generated)
        return pixels, label

    def known_label(self, index: int) -> int:
        return -1

    def path(self, index: int) -> str | None:
        return None


class FolderSamples:
    """Image files under a root, in the order of a listing."""

    def __init__(self, root: str, files: Listing) -> None:
        self._root = os.fsencode(os.path.abspath(root))
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int, clock: StageClock) -> bytes:
        """The content of a file."""
        started = time.perf_counter()
        with open(os.path.join(self._root, self._files.path(index)), "rb", buffering=0) as file:
            data = file.read()
        clock("read", time.perf_counter() - started)
        return data

    def load(
        self, index: int, transform: Transform, clock: StageClock, data: bytes | None = None
    ) -> tuple[Pixels, int]:
        if data is None:
            data = self.read(index, clock)
        started = time.perf_counter()
        image = decode(data)
        decoded = time.perf_counter()
        clock("decode", decoded - started)
        pixels = transform.geometry(image)
        clock("resize", time.perf_counter() - decoded)
        return pixels, self.known_label(index)

    def known_label(self, index: int) -> int:
        return self._files.label(index)

    def path(self, index: int) -> str | None:
        return listing.readable(self._files.path(index))


class ChosenSamples:
    """Some samples of a dataset, numbered from 0."""

    def __init__(self, samples: Samples, chosen: npt.NDArray[np.int64]) -> None:
        self._samples, self._chosen = samples, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def read(self, index: int, clock: StageClock) -> bytes | None:
        return self._samples.read(int(self._chosen[index]), clock)

    def load(
        self, index: int, transform: Transform, clock: StageClock, data: bytes | None = None
    ) -> tuple[Pixels, int]:
        return self._samples.load(int(self._chosen[index]), transform, clock, data)

    def known_label(self, index: int) -> int:
        return self._samples.known_label(int(self._chosen[index]))

    def path(self, index: int) -> str | None:
        return self._samples.path(int(self._chosen[index]))


def find_listing(config: Config, run_dir: Path, *, afresh: bool, world: World) -> Listing | None:
    """List the dataset on rank 0. Collective: every rank calls this; None elsewhere and where none is needed.

    Raises:
        UsageError: the folder is missing, unreadable or holds no image.
    """
    with world.together("list the images"):
        if world.rank == 0 and isinstance(config.data, FolderConfig):
            return _list_folder(config, config.data, run_dir, afresh=afresh)
    return None


def _list_folder(config: Config, data: FolderConfig, run_dir: Path, *, afresh: bool) -> Listing:
    # A folder that is continued keeps its listing: it alone says which index is which file.
    known = None if afresh or Manifest.read(run_dir) is None else Listing.open(run_dir / listing.FILE_NAME)
    if known is not None and config.shard is not None:
        # More samples would move the borders between the shards.
        return known
    paths = listing.find_images(data.root, follow_outside=data.follow_outside)
    if known is not None:
        return known.grown(paths)
    if not paths:
        kinds = ", ".join(e.decode().lstrip(".") for e in listing.EXTENSIONS)
        raise UsageError(f"data.root must hold at least one image ({kinds}), got {data.root!r}. Name another folder.")
    files = Listing.build(paths)
    names = [listing.readable(name) for name in files.classes()]
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    labels = f"labels from {len(names):,} class folders ({shown})"
    why_not = "no labels: not every image lies in one level of class folders"
    log.info("%s images, %s", f"{len(paths):,}", labels if names else why_not)
    return files


def open_samples(config: Config, files: Listing | None) -> Samples:
    """The samples of a dataset, given its listing where it has one."""
    data: Any = config.data
    if isinstance(data, FolderConfig):
        assert files is not None
        return FolderSamples(data.root, files)
    if isinstance(data, ArrayConfig):
        return ArraySamples(data)
    return FakeSamples(data)
