"""Images of many kinds with boxes in them, as a list and as Parquet files, and their crops by Pillow."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from mgpu_ddp.config.schema import ListConfig, ParquetConfig
from tests.support.samples import photo

BROKEN = (3, 9)
"""Images that cannot be decoded."""
EMPTY = [[5.0, 5.0, 5.0, 9.0], [float("nan"), 0.0, 3.0, 3.0], [500.0, 0.0, 900.0, 9.0]]
NUM_IMAGES = 14


def make_image(path: Path, number: int) -> None:
    """A file of odd sides: JPEGs in each orientation, grey and CMYK, PNGs with alpha, and broken ones."""
    image = photo(31 + 6 * number, 75 - 4 * number, number)
    if number in BROKEN:
        path.write_bytes(b"not an image")
    elif number == 4:
        alpha = Image.linear_gradient("L").resize(image.size)
        image.putalpha(alpha)
        image.save(path, "PNG")
    else:
        exif = Image.Exif()
        exif[0x0112] = number % 8 + 1
        kind = {5: "CMYK", 6: "L"}.get(number, "RGB")
        image.convert(kind).save(path, "JPEG", exif=exif, quality=90)


def boxes_of(path: Path, number: int) -> list[list[float]]:
    """Boxes of an image: a pixel, its edges, halves, beyond it, and empty ones."""
    if number in (0, 7):
        return []
    width, height = upright(path).size if number not in BROKEN else (20, 20)
    random = np.random.default_rng(number)
    corners = random.uniform(0, (width / 2, height / 2), (number % 4, 2))
    drawn = [[x, y, x + width / 3 + 1, y + height / 3 + 1] for x, y in corners.tolist()]
    fixed = [[7.0, 3.0, 8.0, 4.0], [0.5, 1.5, width - 0.5, height - 1.5], [-4.0, -3.5, width + 9, height / 2]]
    return [*drawn, *fixed, *(EMPTY if number == 5 else [])]


def upright(path: Path) -> Image.Image:
    """An image as Pillow alone makes it upright RGB."""
    with Image.open(path) as image:
        turned = ImageOps.exif_transpose(image)
        if turned.mode == "RGBA":
            white = Image.new("RGBA", turned.size, "white")
            turned = Image.alpha_composite(white, turned)
        return turned.convert("RGB")


def crop_of(path: Path, box: list[float]) -> Image.Image | None:
    """A crop as Pillow makes it, of what of a box lies inside; None where that is nothing."""
    if np.isnan(box).any():
        return None
    image = upright(path)
    x0, y0, x1, y1 = np.rint(box).astype(int).clip(0, [*image.size] * 2).tolist()
    return image.crop((x0, y0, x1, y1)) if x0 < x1 and y0 < y1 else None


def boxed(root: Path, repeat: int = 1) -> tuple[list[tuple[Path, list[float]]], dict[str, Any]]:
    """All boxes with their images, in order, each so many times, and the sources that hold them."""
    paths = [root / f"{number:02}.img" for number in range(NUM_IMAGES)]
    for number, path in enumerate(paths):
        make_image(path, number)
    boxes = [boxes_of(path, number) * repeat for number, path in enumerate(paths)]
    lines = ["path,boxes"]
    for path, mine in zip(paths, boxes, strict=True):
        text = json.dumps(mine)
        lines.append(f'{path.name},"{text if mine else ""}"')
    (root / "boxes.csv").write_text("\n".join([*lines, ""]))
    structs = [[dict(zip(("x0", "y0", "x1", "y1"), box, strict=True)) for box in mine] for mine in boxes]
    kind = pa.list_(pa.struct([(name, pa.float64()) for name in ("x0", "y0", "x1", "y1")]))
    for number in range(2):
        some = slice(number * 7, number * 7 + 7)
        columns = {
            "image": [path.read_bytes() for path in paths[some]],
            "name": [path.name for path in paths[some]],
            "boxes": pa.array(structs[some], kind),
        }
        pq.write_table(pa.table(columns), root / f"{number}.parquet", row_group_size=3)
    return [(path, box) for path, mine in zip(paths, boxes, strict=True) for box in mine], {
        "list": ListConfig(path=str(root / "boxes.csv"), box_column="boxes"),
        "parquet": ParquetConfig(urls=f"{root}/*.parquet", box_column="boxes", key_column="name"),
    }
