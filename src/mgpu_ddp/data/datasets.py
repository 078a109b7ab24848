"""Names of datasets → samples that a loader worker can read one by one."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from mgpu_ddp.config.checks import require
from mgpu_ddp.config.schema import (
    ArrayConfig,
    Config,
    FakeConfig,
    FolderConfig,
    ListConfig,
    Listed,
    ParquetConfig,
    WebDatasetConfig,
)
from mgpu_ddp.data import listing
from mgpu_ddp.data.archives import index_shards
from mgpu_ddp.data.array import ArraySamples
from mgpu_ddp.data.files import FileSamples, list_folder, read_list
from mgpu_ddp.data.listing import Listing
from mgpu_ddp.data.parquet import ParquetSamples, advise_block, index_parquet
from mgpu_ddp.data.tar import TarSamples, index_tar
from mgpu_ddp.distributed.world import World
from mgpu_ddp.preprocess.transform import Layout, Pixels, StageClock, Transform


class Samples(Protocol):
    """A dataset of images: any index from 0 to len - 1, in any order, from any process."""

    @property
    def layout(self) -> Layout | None:
        """Of what `load` returns without a transform, where that needs no decoding and is always the same."""
        ...

    @property
    def looks_ahead(self) -> bool:
        """It is worth telling it what comes after the batch that is made now."""
        ...

    def __len__(self) -> int: ...

    def expect(self, indices: Sequence[int]) -> None:
        """These are read next, in this order."""
        ...

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

    def names(self, indices: npt.NDArray[np.int64]) -> Any:
        """The names of several rows, an Arrow array of strings."""
        ...


class FakeSamples:
    """torchvision's FakeData, bit for bit, without its detour through PIL and the global random state.

    Source: torchvision.datasets.FakeData and transforms.functional.to_pil_image.
    """

    looks_ahead = False

    def __init__(self, config: FakeConfig) -> None:
        self._config = config
        self._generator = torch.Generator()
        self._noise = torch.empty(config.image_size)
        _, height, width = config.image_size
        self.layout = Layout(height=height, width=width, planar=True)

    def __len__(self) -> int:
        return self._config.size

    def expect(self, indices: Sequence[int]) -> None:
        pass

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

    def names(self, indices: npt.NDArray[np.int64]) -> Any:
        return listing.no_names(len(indices))


class ChosenSamples:
    """Some samples of a dataset, numbered from 0."""

    def __init__(self, samples: Samples, chosen: npt.NDArray[np.int64]) -> None:
        self._samples, self._chosen = samples, chosen
        self.layout, self.looks_ahead = samples.layout, samples.looks_ahead

    def __len__(self) -> int:
        return len(self._chosen)

    def expect(self, indices: Sequence[int]) -> None:
        self._samples.expect(self._chosen[np.asarray(indices, dtype=np.int64)].tolist())

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

    def names(self, indices: npt.NDArray[np.int64]) -> Any:
        return self._samples.names(self._chosen[indices])


def find_listing(config: Config, known: Listing | None, world: World) -> Listing | None:
    """List the dataset on rank 0. Collective: every rank calls this; None elsewhere and where none is needed.

    What is `known` keeps its index.

    Raises:
        UsageError: the images are missing or unreadable, or there are none.
    """
    data = config.data
    with world.together("list the images"):
        if world.rank != 0 or not isinstance(data, Listed):
            pass
        elif isinstance(data, ListConfig):
            return read_list(data)
        elif isinstance(data, FolderConfig):
            # More samples would move the borders between the shards.
            return list_folder(data, known, may_grow=config.shard is None)
    if isinstance(data, WebDatasetConfig):
        files = index_shards(data.urls, partial(index_tar, data), known, world)
        with world.together("look for labels"):
            # A folder that is continued may have been begun without this key: its claim says so.
            none_there = files is not None and known is None and files.table["label"].null_count == len(files)
            rule = "the extension of a member right before or after its images"
            found = not (none_there and data.label_extension)
            require(found, "data.label_extension", rule, data.label_extension, "No image has one: leave it out.")
        return files
    if isinstance(data, ParquetConfig):
        files = index_shards(data.urls, partial(index_parquet, data), known, world)
        if files is not None and config.collect == "gather" and world.size > 1:
            advise_block(files, config.loader.block)
        return files
    return None


def open_samples(config: Config, files: Listing | None) -> Samples:
    """The samples of a dataset, given its listing where it has one."""
    data: Any = config.data
    if isinstance(data, FolderConfig | ListConfig):
        assert files is not None
        return FileSamples(str(data.root), files)
    if isinstance(data, WebDatasetConfig):
        assert files is not None
        return TarSamples(files)
    if isinstance(data, ParquetConfig):
        assert files is not None
        return ParquetSamples(files, data.column)
    if isinstance(data, ArrayConfig):
        return ArraySamples(data)
    return FakeSamples(data)
