"""Odd and broken images through the real command: one row each, a prediction like torchvision's or a reason."""

import io
import json
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps
from torchvision.transforms import v2

from mgpu_ddp.preprocess import heic
from mgpu_ddp.preprocess.transform import FORMATS, MEAN, STD
from tests.support.heics import PLAIN, ROTATED
from tests.support.runs import assert_proved, read_rows
from tests.support.samples import encoded, photo
from tests.support.starting import SMALL_IMAGES, ranks, run

CORPUS = "MGPU_DDP_BAD_IMAGES"
"""Environment variable that names a folder of odd and broken images."""
SETTINGS = (*SMALL_IMAGES, "data=folder", "output.dir=out", "loader.max_pixels=2000000")


def oriented(orientation: int) -> bytes:
    """A photo stored turned, with the EXIF tag that makes it upright again."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    stored = photo() if undo is None else photo().transpose(Image.Transpose(undo))
    return encoded(stored, "PNG", exif=exif)


def transparent() -> Image.Image:
    image = photo().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def on_white() -> Image.Image:
    upper = transparent()
    return Image.alpha_composite(Image.new("RGBA", upper.size, "white"), upper).convert("RGB")


def sixteen_bit() -> Image.Image:
    ramp = np.linspace(0, 65535, 48 * 40).reshape(40, 48).astype(np.uint16)
    return Image.fromarray(ramp)


def bomb() -> bytes:
    """A small PNG that claims 60000 by 60000 pixels."""
    data = encoded(photo(), "PNG")
    header = b"IHDR" + (60000).to_bytes(4, "big") * 2 + data[24:29]
    return data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]


GOOD: dict[str, tuple[bytes, Callable[[], Image.Image]]] = {
    "progressive.jpg": (encoded(photo(), "JPEG", progressive=True), photo),
    "cmyk.jpg": (encoded(photo().convert("CMYK"), "JPEG"), photo),
    "grey.jpg": (encoded(photo().convert("L"), "JPEG"), lambda: photo().convert("L").convert("RGB")),
    "grey16.png": (
        encoded(sixteen_bit(), "PNG"),
        lambda: Image.fromarray((np.asarray(sixteen_bit()) >> 8).astype(np.uint8)).convert("RGB"),
    ),
    "palette.png": (encoded(photo().quantize(16), "PNG"), lambda: photo().quantize(16).convert("RGB")),
    "alpha.png": (encoded(transparent(), "PNG"), on_white),
    "bilevel.tif": (encoded(photo().convert("1"), "TIFF"), lambda: photo().convert("1").convert("RGB")),
    "one pixel.bmp": (encoded(photo(1, 1), "BMP"), lambda: photo(1, 1)),
    "one by 5000.png": (encoded(photo(1, 5000), "PNG"), lambda: photo(1, 5000)),
    "PNG in disguise.JPG": (encoded(photo(), "PNG"), photo),
    "animated.gif": (
        encoded(photo().quantize(16), "GIF", save_all=True, append_images=[photo(seed=1).quantize(16)]),
        lambda: photo().quantize(16).convert("RGB"),
    ),
    "lossless.webp": (encoded(photo(), "WEBP", lossless=True), photo),
    "AVIF in disguise.jpg": (encoded(photo(), "AVIF"), photo),
    "photo.avif": (encoded(photo(), "AVIF"), photo),
    "HEIC in disguise.jpg": (PLAIN, photo),
    "on its side.HEIC": (ROTATED, photo),
    **{f"orientation {n}.png": (oriented(n), photo) for n in range(1, 9)},
    "line\nbreak.png": (encoded(photo(), "PNG"), photo),
    "snow ☃.png": (encoded(photo(), "PNG"), photo),
}
BAD: dict[str, tuple[bytes, str]] = {
    "empty.jpg": (b"", "empty, or not an image"),
    "text.png": (b"not an image at all\n" * 40, "not an image in an allowed format"),
    "page.jpg": (encoded(photo(), "PDF"), "not an image in an allowed format"),
    "cut.jpg": (encoded(photo(), "JPEG")[:-300], "truncated"),
    "cut.png": (encoded(photo(), "PNG")[:500], "truncated"),
    "cut in the header.jpg": (encoded(photo(), "JPEG")[:10], "Truncated"),
    "bomb.png": (bomb(), "exceeds limit of 2000000 pixels"),
    "bomb.heic": (
        # It also says what to cut out of the larger one.
        PLAIN.replace(struct.pack(">II", 64, 64), struct.pack(">II", 16000, 12000)).replace(b"clap", b"free"),
        "exceeds limit of 2000000 pixels",
    ),
    "cut.heic": (PLAIN[:-100], "OSError: "),
    "cut in the header.heif": (PLAIN[:300], "broken HEIC"),
    "cut.avif": (encoded(photo(), "AVIF")[:-100], "Error: "),
    "one by 80000.png": (encoded(photo(1, 80000), "PNG"), "too narrow a strip"),
}


def plain_loop(images: list[Image.Image]) -> tuple[Any, Any]:
    """Predict ready RGB images with torchvision alone: (pred, prob)."""
    torch.manual_seed(0)
    model = torchvision.models.get_model("squeezenet1_1", weights=None, num_classes=12).eval()
    transform = v2.Compose([v2.Resize(37), v2.CenterCrop(32), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    with torch.inference_mode():
        batch = torch.stack([v2.functional.normalize(transform(image), MEAN, STD) for image in images])
        best = model(batch).softmax(dim=1).max(dim=1)
    return best.indices.numpy(), best.values.numpy()


def test_each_odd_image_has_one_row_and_costs_its_neighbours_nothing(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for name, (data, _) in (GOOD | BAD).items():
        (root / name).write_bytes(data)
    not_utf8 = os.fsencode(root) + b"/caf\xe9.png"
    Path(os.fsdecode(not_utf8)).write_bytes(encoded(photo(), "PNG"))
    os.mkfifo(root / "pipe.jpg")
    (root / "folder.jpg").mkdir()
    (root / "dangling.jpg").symlink_to("nowhere")
    (root / "device.jpg").symlink_to("/dev/zero")
    for name in ("._progressive.jpg", "notes.txt", "scan.jp2"):
        (root / name).touch()
    ended = run(ranks(2, *SETTINGS, "data.root=images"), tmp_path)
    assert ended.code == 0, ended.err
    assert_proved(tmp_path / "out", len(GOOD) + len(BAD) + 1, errors=len(BAD))
    left_out = {".jp2": 1, ".txt": 1, "of the system": 1, "no regular files": 1, "links to nothing": 1}
    left_out["behind links out of data.root (data.follow_outside)"] = 1
    assert ended.summary["left_out"] == left_out
    said = (
        "6 files left out: 1 .jp2, 1 .txt, 1 behind links out of data.root (data.follow_outside), 1 links to nothing, "
    )
    assert (ended.err.count(said), ended.out.count(said)) == (1, 1), "in the log and in the last table"
    assert said in (tmp_path / "out" / "report.html").read_text()
    rows = {row["path"]: row for row in read_rows(tmp_path / "out")}
    assert set(rows) == {*GOOD, *BAD, "caf\\udce9.png"}
    for name, (_, reason) in BAD.items():
        assert reason in rows[name]["error"], name
        assert "\n" not in rows[name]["error"]
        assert rows[name]["pred"] is rows[name]["prob"] is rows[name]["topk_index"] is None
    found = {json.loads(line)["path"] for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()}
    assert found == set(BAD)
    names = list(GOOD)
    # Where the format loses something, the loss is part of what should be predicted.
    lossy = {name for name in names if name.lower().endswith((".jpg", ".avif", ".heic"))}
    heic.register()
    images = [
        Image.open(io.BytesIO(GOOD[name][0])).convert("RGB") if name in lossy else GOOD[name][1]() for name in names
    ]
    pred, prob = plain_loop(images)
    for name, expected, probability in zip(names, pred.tolist(), prob.tolist(), strict=True):
        assert rows[name]["error"] is None, name
        assert rows[name]["pred"] == expected, name
        assert rows[name]["prob"] == pytest.approx(probability, abs=1e-5), name


def decodes(path: Path) -> bool:
    """Try to decode a file with Pillow alone, in one of the allowed formats."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as image:
                image.load()
                ImageOps.exif_transpose(image).convert("RGB")
    except Exception:
        return False
    return True


@pytest.mark.skipif(CORPUS not in os.environ, reason=f"needs {CORPUS}, a folder of odd and broken images")
def test_a_corpus_of_broken_images_costs_no_process(tmp_path: Path) -> None:
    root = Path(os.environ[CORPUS])
    ended = run(
        ranks(2, *SMALL_IMAGES, "data=folder", f"data.root={root}", "output.dir=out", "loader.timeout_s=10"),
        tmp_path,
    )
    assert ended.code == 0, ended.err
    rows = read_rows(tmp_path / "out")
    assert len({row["path"] for row in rows}) == len(rows) == ended.summary["samples"]
    predicted = {row["path"] for row in rows if row["error"] is None}
    narrow = {row["path"] for row in rows if row["error"] and "too narrow" in row["error"]}
    assert predicted | narrow == {row["path"] for row in rows if decodes(root / row["path"])}
    assert not any(row["error"] and "took longer" in row["error"] for row in rows)
