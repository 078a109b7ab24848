"""The sources of images: for each kind of `data`, how its images are listed and read.

docs/architecture.md lists all steps of adding a source.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mgpu_ddp.config.schema import (
    ArrayConfig,
    Config,
    FakeConfig,
    FolderConfig,
    ListConfig,
    ParquetConfig,
    ScriptDataConfig,
    WebDatasetConfig,
)
from mgpu_ddp.data import array
from mgpu_ddp.data.encoded import EncodedSamples
from mgpu_ddp.data.fake import FakeSamples
from mgpu_ddp.data.files import FileSamples, list_folder
from mgpu_ddp.data.list_file import read_list
from mgpu_ddp.data.listing import Listing
from mgpu_ddp.data.parquet import ParquetSamples, list_parquet
from mgpu_ddp.data.samples import Samples
from mgpu_ddp.data.script_dataset import ScriptDataset, open_script_dataset
from mgpu_ddp.data.tar import TarSamples, list_tars
from mgpu_ddp.distributed.world import World

Find = Callable[[Config, Listing | None, World], Listing | None]
"""List the images on rank 0; what is known keeps its index. Collective: every rank calls this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """How images of one kind are listed and read."""

    open: Callable[[Any, Any], Samples]
    """Open the samples, given `config.data` and the listing, if there is one."""
    find: Find | None = None
    """None where the images need no listing."""
    identity: Callable[[Any], str | None] = lambda data: None
    """Tell one dataset from another that the same keys name, where there is no listing to do so."""


def _on_rank_0(find: Callable[[Config, Listing | None], Listing]) -> Find:
    """Make a listing that rank 0 reads alone a collective one."""

    def find_together(config: Config, known: Listing | None, world: World) -> Listing | None:
        with world.together("list the images"):
            return find(config, known) if world.rank == 0 else None

    return find_together


SOURCES: dict[type, Source] = {
    FakeConfig: Source(open=lambda data, files: FakeSamples(data)),
    FolderConfig: Source(open=lambda data, files: FileSamples(data.root, files), find=_on_rank_0(list_folder)),
    ListConfig: Source(
        open=lambda data, files: FileSamples(data.root, files),
        find=_on_rank_0(lambda config, known: read_list(config.data, known)),
    ),
    WebDatasetConfig: Source(open=lambda data, files: TarSamples(files), find=list_tars),
    ParquetConfig: Source(open=lambda data, files: ParquetSamples(files, data.column), find=list_parquet),
    ArrayConfig: Source(open=lambda data, files: array.ArraySamples(data), identity=array.identity),
    ScriptDataConfig: Source(open=lambda data, dataset: open_script_dataset(dataset)),
}


def find_listing(config: Config, known: Listing | None, world: World) -> Listing | None:
    """List the dataset on rank 0. Collective: every rank calls this; None elsewhere and where none is needed.

    What is `known` keeps its index.

    Raises:
        UsageError: the images are missing or unreadable, or there are none.
    """
    find = SOURCES[type(config.data)].find
    return None if find is None else find(config, known, world)


def open_samples(config: Config, files: Listing | ScriptDataset | None) -> Samples:
    """Open the samples of a dataset, given its listing where it has one, or the script's own."""
    samples = SOURCES[type(config.data)].open(config.data, files)
    if isinstance(samples, EncodedSamples):
        samples.has_size = "size" in config.output.fields
    return samples


def identity(config: Config) -> str | None:
    """Tell one dataset without a listing from another that the same keys name; None where the keys are enough."""
    return SOURCES[type(config.data)].identity(config.data)
