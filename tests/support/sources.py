"""One set of images as every source has it: files, a list, tars and Parquet."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mgpu_ddp.config.schema import Config, ListConfig, ModelConfig, ParquetConfig, TransformConfig, WebDatasetConfig
from mgpu_ddp.data.datasets import find_listing, open_samples
from mgpu_ddp.data.listing import Listing
from mgpu_ddp.data.parquet import ParquetSamples
from mgpu_ddp.data.samples import Samples
from mgpu_ddp.distributed.world import World

Source = ListConfig | WebDatasetConfig | ParquetConfig


def member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def tar_of(path: Path, members: dict[str, bytes], **options: Any) -> Path:
    """A tar of members by name."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items():
            member(tar, name, content)
    return path


def labelled_paths(files: Listing) -> list[tuple[bytes, int]]:
    """All rows of a listing."""
    return [(files.path(i), files.label(i)) for i in range(len(files))]


def parquet_of(path: Path, /, group: int = 3, **columns: Any) -> Path:
    """A Parquet file of columns, in row groups of so many rows."""
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def config_of(data: Any) -> Config:
    return Config(data=data, transform=TransformConfig(), model=ModelConfig())


def list_source(data: Any, world: World) -> Listing:
    files = find_listing(config_of(data), None, world)
    assert files is not None
    return files


def open_source(data: Any, world: World) -> Samples:
    """List and open the samples of a source."""
    return open_samples(config_of(data), find_listing(config_of(data), None, world))


def index_tars(pattern: Path, world: World, **settings: Any) -> Listing:
    return list_source(WebDatasetConfig(urls=str(pattern), **settings), world)


def parquet_samples(pattern: Path, world: World, **settings: Any) -> ParquetSamples:
    data = ParquetConfig(urls=str(pattern), **settings)
    return ParquetSamples(list_source(data, world), data.column)


def write_list(path: Path, images: Sequence[Path], labels: Sequence[int | None]) -> ListConfig:
    """A CSV of images beside it."""
    lines = [
        f"{image.relative_to(path.parent)},{'' if label is None else label}"
        for image, label in zip(images, labels, strict=True)
    ]
    path.write_text("\n".join(["path,label", *lines, ""]))
    return ListConfig(path=str(path))


def write_tar(path: Path, images: Sequence[Path], labels: Sequence[int | None]) -> None:
    """A tar as WebDataset has it: beside each image its class, and what must never be looked into."""
    with tarfile.open(path, "w") as tar:
        for image, label in zip(images, labels, strict=True):
            member(tar, f"{image.stem}.json", b"{")
            member(tar, f"{image.stem}{image.suffix}", image.read_bytes())
            member(tar, f"{image.stem}.pyd", b"cos\nsystem\n(S'exit 1'\ntR.")
            if label is not None:
                member(tar, f"{image.stem}.cls", f"{label}\n".encode())


def write_parquet(path: Path, images: Sequence[Path], labels: Sequence[int | None], *, group: int) -> None:
    """A Parquet file as Hugging Face datasets have it."""
    values = [{"bytes": image.read_bytes(), "path": image.name} for image in images]
    pq.write_table(pa.table({"image": values, "label": pa.array(labels, pa.int64())}), path, row_group_size=group)


def sources(root: Path, images: Sequence[Path], labels: Sequence[int | None]) -> dict[str, Source]:
    """The images below a root, in their order, as each source, three archives each."""
    third = -(-len(images) // 3)
    for number in range(3):
        mine = slice(number * third, (number + 1) * third)
        write_tar(root / f"shard-{number:02}.tar", images[mine], labels[mine])
        write_parquet(root / f"shard-{number:02}.parquet", images[mine], labels[mine], group=4)
    return {
        "list": write_list(root / "list.csv", images, labels),
        "webdataset": WebDatasetConfig(urls=f"{root}/shard-{{00..02}}.tar", label_extension="cls"),
        "parquet": ParquetConfig(urls=f"{root}/*.parquet", label_column="label", key_column="image.path"),
    }
