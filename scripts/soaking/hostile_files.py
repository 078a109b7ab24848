"""Inputs that lie, are cut short or are no files at all, and folders of somebody else's to write into."""

import io
import os
import random
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from soaking.hostile_trial import Trial, job, spoil
from tests.support.runs import make_images
from tests.support.sources import tar_of
from tests.support.starting import SMALL, SMALL_IMAGES

CLASSES = 12
IMAGES_PER_FOLDER = 20
FORMATS = ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "ICO"]
OURS = """
    predictions predictions/part-000000000000-ab12.parquet predictions/thesis.csv manifest.json status.json .lock
    listing.arrow predictions.npy errors.jsonl metrics.json classes.json report.html logs logs/rank0.log .hydra .next
    .hydra/config.yaml .ready .old .next/manifest.json .old/thesis.txt .ready/predictions/thesis.csv thesis.txt
    profile logs/access.log .manifest.json.ab12.tmp
""".split()  # noqa: SIM905
MORE = """
    overwrite=true retry_failed=true resume=false output.format=npy output.format=csv hydra.run.dir=../mine
    runtime.profile=true output.collect=shards
""".split()  # noqa: SIM905
TEXTS = ["", "{}", "user's own\n", '{"parts": []}', "held by me", "[" * 9000]


class Files:
    """Makes files, out of real ones of every kind that a key may name."""

    def __init__(self, work: Path) -> None:
        import safetensors.torch
        import torch
        from torchvision.models import squeezenet1_1

        self._real = real = work / "real"
        images = make_images(real / "images", 6)
        encoded = [path.read_bytes() for path in images]
        (real / "list.csv").write_text("path,label\n" + "".join(f"{path},{i}\n" for i, path in enumerate(images)))
        (real / "list.txt").write_text("".join(f"{path}\n" for path in images))
        (real / "names.txt").write_text("".join(f"class {i}\n" for i in range(CLASSES)))
        (real / "names.json").write_text(str([f"class {i}" for i in range(CLASSES)]).replace("'", '"'))
        pq.write_table(pa.table({"path": [str(path) for path in images], "label": range(6)}), real / "list.parquet")
        pq.write_table(pa.table({"image": encoded, "label": range(6)}), real / "images.parquet", row_group_size=2)
        tar_of(real / "images.tar", {f"{i}.{kind}": data for i, data in enumerate(encoded) for kind in ("jpg", "cls")})
        np.save(real / "images.npy", np.zeros((6, 32, 32, 3), np.uint8))
        torch.manual_seed(0)
        state = squeezenet1_1(num_classes=CLASSES).half().state_dict()
        torch.save(state, real / "model.pt")
        safetensors.torch.save_file(state, real / "model.safetensors")
        (real / "option.yaml").write_text("defaults: [fake]\nsize: 4\nimage_size: [3, 32, 32]\n")
        photos = {kind: io.BytesIO() for kind in FORMATS}
        with Image.open(images[0]) as image:
            for kind, file in photos.items():
                image.save(file, kind)
        self._photos = [file.getvalue() for file in photos.values()]
        named = {
            **{f"list.{kind}": ["data=list", "data.path=PATH"] for kind in ("csv", "txt", "parquet")},
            "images.parquet": ["data=parquet", "data.urls=PATH", "data.label_column=label"],
            "images.tar": ["data=webdataset", "data.urls=PATH", "data.label_extension=cls"],
            "images.npy": ["data=array", "data.path=PATH"],
            **{f"model.{kind}": [*SMALL[3:4], "data.size=4", "model.weights=PATH"] for kind in ("pt", "safetensors")},
            **{f"names.{kind}": [*SMALL[3:4], "data.size=4", "model.class_names=PATH"] for kind in ("txt", "json")},
            "option.yaml": ["--config-dir", "../mine", "data=option"],
        }
        self._named = list(named.items())

    def make(self, rng: random.Random, folder: Path) -> Trial:
        """One file, a folder of images, or a folder of somebody else's that is to hold the output."""
        (folder / "mine").mkdir()
        (folder / "mine" / "secret").write_text("nobody may change this")
        if rng.random() < 0.15:
            return self._images(rng, folder)
        return self._foreign(rng, folder) if rng.random() < 0.35 else self._file(rng, folder)

    def _images(self, rng: random.Random, folder: Path) -> Trial:
        root = folder / "mine" / "images"
        root.mkdir()
        for number in range(IMAGES_PER_FOLDER):
            path = root / f"{number}{rng.choice(['.jpg', '.png', '.tif', '.webp', '.JPEG', '.gif'])}"
            make_special(path, rng) if rng.random() < 0.1 else path.write_bytes(spoil(rng.choice(self._photos), rng))
        words = ["data=folder", "data.root=../mine/images", *SMALL_IMAGES, "loader.timeout_s=5", "output.dir=out"]
        return Trial(what="images", size=IMAGES_PER_FOLDER, command=job(rng, *words))

    def _file(self, rng: random.Random, folder: Path) -> Trial:
        name, words = rng.choice(self._named)
        path = folder / "mine" / name
        if "option" in name:
            path = folder / "mine" / "data" / name
            path.parent.mkdir()
        if rng.random() < 0.12:
            make_special(path, rng)
        elif rng.random() < 0.08:
            # Another kind of file, by this one's name.
            shutil.copyfile(self._real / rng.choice(self._named)[0], path)
        else:
            path.write_bytes(spoil((self._real / name).read_bytes(), rng))
        words = [word.replace("PATH", str(path)) for word in words]
        return Trial(what=name, command=job(rng, *SMALL_IMAGES, *words, "limit=6", "output.dir=out"))

    def _foreign(self, rng: random.Random, folder: Path) -> Trial:
        """A folder that some files and links make look like a run folder."""
        mine = folder / "mine"
        for name in rng.sample(OURS, rng.randint(1, 4)):
            path = mine / name
            if not _make_room(path):
                continue
            if rng.random() < 0.3:
                make_special(path, rng)
            elif "." not in name[1:] and name != ".lock":
                path.mkdir()
            else:
                path.write_text(rng.choice(TEXTS))
        words = [*SMALL, "data.size=4", "output.dir=../mine"]
        more = rng.sample(MORE, rng.randint(0, 3))
        inputs = [f"model.class_names=../mine/{rng.choice(OURS)}"] if rng.random() < 0.2 else []
        size = sum(path.name in OURS for path in mine.rglob("*")) + 1
        return Trial(
            what="a foreign folder",
            size=size,
            command=job(rng, *words, *more, *inputs),
            may_make=lambda path: path.startswith(("work/", "mine/")),
        )


def make_special(path: Path, rng: random.Random) -> None:
    """Put something at a path that is no regular file, or one that never ends."""
    home = next(folder for folder in path.parents if (folder / "secret").exists())
    targets = ["/dev/zero", "/dev/full", "/proc/self/status", "/proc/kmsg", path.name, ".", "..", "nowhere"]
    targets += [str(home / "secret"), str(home), "../elsewhere", "/proc/self/fd/0"]
    kinds: list[Callable[[], object]] = [
        lambda: os.mkfifo(path),
        lambda: path.mkdir(),
        lambda: path.symlink_to(rng.choice(targets)),
        lambda: path.symlink_to(rng.choice(targets)),
        lambda: (path.touch(), os.truncate(path, 1 << 40)),
        lambda: _listen(path),
    ]
    rng.choice(kinds)()


def _make_room(path: Path) -> bool:
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent.is_dir() and path.parent.resolve() == path.parent and not os.path.lexists(path)


def _listen(path: Path) -> None:
    here = os.open(path.parent, os.O_PATH)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{here}/{path.name}")
    finally:
        os.close(here)
