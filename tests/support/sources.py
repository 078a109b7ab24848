"""One set of images as every source has it: files, a list, tars and Parquet."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mgpu_ddp.config.schema import ListConfig, ParquetConfig, WebDatasetConfig

Source = ListConfig | WebDatasetConfig | ParquetConfig


def member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_list(path: Path, images: Sequence[Path], labels: Sequence[int | None]) -> ListConfig:
    """A CSV of images beside it."""
    lines = [
        f"{image.relative_to(path.parent)},{'' if label is None else label}"
        for image, label in zip(images, labels, strict=True)
    ]
    path.write_text("\n".join(["path,label", *lines, ""]))
    return ListConfig(path=str(path))


def write_tar(path: Path, images: Sequence[Path], labels: Sequence[int | None]) -> None:
    """A shard as WebDataset has it: beside each image its class, and what must never be looked into."""
    with tarfile.open(path, "w") as tar:
        for image, label in zip(images, labels, strict=True):
            member(tar, f"{image.stem}.json", b"{")
            member(tar, f"{image.stem}{image.suffix}", image.read_bytes())
            member(tar, f"{image.stem}.pyd", b"cos\nsystem\n(S'exit 1'\ntR.")
            if label is not None:
                member(tar, f"{image.stem}.cls", f"{label}\n".encode())


def write_parquet(path: Path, images: Sequence[Path], labels: Sequence[int | None], *, group: int) -> None:
    """A shard as Hugging Face datasets have it."""
    values = [{"bytes": image.read_bytes(), "path": image.name} for image in images]
    pq.write_table(pa.table({"image": values, "label": pa.array(labels, pa.int64())}), path, row_group_size=group)


def sources(root: Path, images: Sequence[Path], labels: Sequence[int | None]) -> dict[str, Source]:
    """The images below a root, in their order, as each source, three shards each."""
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
