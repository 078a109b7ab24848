"""Piles as people have them: photos of phones, and what a crawler brings from the web."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benching.jpegs import fill, picture

PHOTO, PHOTO_QUALITY, PHOTO_GRAIN = (4032, 3024), 90, 6.0
ORIENTATIONS = (1, 1, 1, 6, 8, 3, 1, 6)
"""EXIF's, in turn."""
WEB_MEGAPIXELS, WEB_QUALITY = (0.1, 3.0), 70
WEB_KINDS = (
    ("jpg", 0.66, {}),
    ("jpg", 0.19, {"progressive": True}),
    ("png", 0.07, {}),
    ("webp", 0.05, {}),
    ("jpg", 0.015, {"mode": "L"}),
    ("jpg", 0.015, {"mode": "CMYK"}),
)
"""Suffix, share and how it is saved. Source: shares of formats as crawls of the web have them."""


def make_pile(work: Path, name: str, make: Callable[[int], tuple[str, bytes]], *, images: int, distinct: int) -> Path:
    """Make a folder of images of which so many are different; all others are hard links to them."""
    distinct = min(distinct, images)
    different, folder = work / f"{name}-{distinct}", work / f"{name}-{images}-of-{distinct}"
    if not different.exists():
        fill(different, distinct, _Write(make))
    if not folder.exists():
        originals = sorted(different.rglob("*.*"), key=lambda path: path.stem)
        fill(folder, images, _Link(originals))
    return folder


class _Write:
    """Write one image under the suffix of its format."""

    def __init__(self, make: Callable[[int], tuple[str, bytes]]) -> None:
        self._make = make

    def __call__(self, path: Path, number: int) -> None:
        suffix, data = self._make(number)
        path.with_suffix(f".{suffix}").write_bytes(data)


class _Link:
    """Link one image to its original."""

    def __init__(self, originals: list[Path]) -> None:
        self._originals = originals

    def __call__(self, path: Path, number: int) -> None:
        original = self._originals[number % len(self._originals)]
        os.link(original, path.with_suffix(original.suffix))


def photo(number: int) -> tuple[str, bytes]:
    """Photo number `number`: 12 megapixels, grainy, turned by its EXIF orientation."""
    import numpy as np
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = ORIENTATIONS[number % len(ORIENTATIONS)]
    image = picture(np.random.default_rng(number), *PHOTO, grain=PHOTO_GRAIN)
    return "jpg", _saved(image, "JPEG", quality=PHOTO_QUALITY, exif=exif)


def web(number: int) -> tuple[str, bytes]:
    """Image number `number` of the web: its format and its size are drawn."""
    import numpy as np

    random = np.random.default_rng((1, number))
    pixels = 1e6 * np.exp(random.uniform(*np.log(WEB_MEGAPIXELS)))
    height = int((pixels * random.uniform(0.6, 1.4)) ** 0.5)
    image = picture(random, int(pixels / height), height, grain=0.0)
    shares = np.array([share for _, share, _ in WEB_KINDS])
    suffix, _, how = WEB_KINDS[int(random.choice(len(WEB_KINDS), p=shares / shares.sum()))]
    if suffix == "png":
        # Drawings and logos more often than photos.
        return suffix, _saved(image.quantize(64), "PNG")
    options = {"quality": WEB_QUALITY, "progressive": how.get("progressive", False)}
    return suffix, _saved(image.convert(how.get("mode", "RGB")), "WEBP" if suffix == "webp" else "JPEG", **options)


def _saved(image: Any, file_format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, file_format, **options)
    return out.getvalue()
