"""The jobs of a soak, small ones over real JPEGs and fake images, and how their rows are compared."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mgpu_ddp.output.manifest import Manifest, Part
from mgpu_ddp.output.parts import array_digest

CLASSES = 12
PIXELS = 32
LOST_AFTER_S = 4.0
"""`dist.timeout_s` of these jobs: when silence counts as death."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """One kind of job: which rows, in which form, and who writes them."""

    data: str
    how: str
    collect: str

    @property
    def rows(self) -> str:
        """Decides its rows: jobs that share this must end with the same ones."""
        return f"{self.data}-{self.how}"

    def __str__(self) -> str:
        return f"{self.data} {self.how} {self.collect}"


KINDS = [
    Kind(data=data, how=how, collect=collect)
    for data, how, collect in (
        ("folder", "parquet", "gather"),
        ("fake", "npy", "shards"),
        ("fake", "parquet", "shards"),
        ("folder", "npy", "gather"),
        ("folder", "parquet", "shards"),
        ("fake", "npy", "gather"),
        ("fake", "parquet", "gather"),
        ("folder", "npy", "shards"),
    )
]
"""All kinds, in an order in which every two neighbours differ in most."""


def make_images(root: Path, count: int, rng: random.Random) -> None:
    """Write a folder of small JPEGs, a few of them empty, cut short or no images at all."""
    from PIL import Image

    noise = np.random.default_rng(rng.getrandbits(32))
    for number in range(count):
        path = root / f"class{number % 3}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = noise.integers(20, 60, 2)
        coarse = noise.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC).save(path)
    spoil: list[Callable[[bytes], bytes]] = [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: b"no image" + data,
    ]
    for number, path in enumerate(rng.sample(sorted(root.rglob("*.jpg")), k=max(3, count // 100))):
        path.write_bytes(spoil[number % 3](path.read_bytes()))


def settings(kind: Kind, images: Path, rows: int, commit_every: int) -> list[str]:
    """Name a job on the command line; `rows` counts where the images are fake."""
    fake = [f"data.size={rows}", f"data.image_size=[3,{PIXELS},{PIXELS}]"]
    return [
        *(fake if kind.data == "fake" else ["data=folder", f"data.root={images}"]),
        f"transform.size={PIXELS}",
        "model.name=squeezenet1_1",
        "model.weights=null",
        f"model.num_classes={CLASSES}",
        "batch_size=4",
        "loader.workers=1",
        "runtime.device=cpu",
        f"dist.timeout_s={LOST_AFTER_S}",
        f"output.commit_every={commit_every}",
        f"output.format={kind.how}",
        f"output.collect={kind.collect}",
        *([] if kind.how == "npy" else ["output.fields=[topk,logits]"]),
    ]


def torn_parts(run_dir: Path) -> list[str]:
    """Say what the manifest lists and the folder does not hold as it says."""
    manifest = Manifest.read(run_dir)
    torn: list[str] = []
    next_index = manifest.start if manifest else 0
    for part in manifest.parts if manifest else []:
        if part.first != next_index:
            torn.append(f"{part.file} begins at {part.first} instead of {next_index}")
        next_index = part.stop
        if manifest is not None and not _is_whole(run_dir, part, manifest.start):
            torn.append(f"{part.file} [{part.first}, {part.stop}) is not what was listed")
    return torn


def _is_whole(run_dir: Path, part: Part, start: int) -> bool:
    path = run_dir / part.file
    try:
        if path.suffix == ".npy":
            return array_digest(np.load(path, mmap_mode="r"), part, start) == part.sha256
        return hashlib.sha256(path.read_bytes()).hexdigest() == part.sha256
    except OSError:
        return False


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """How a table differs from the one it should equal."""

    rows: int
    missing: int
    duplicates: int
    different: int
    unclean: list[str]
    """Anything else that is wrong with the folder."""

    @property
    def is_none(self) -> bool:
        return not (self.missing or self.duplicates or self.different or self.unclean)


def compare(run_dir: Path, reference: Path) -> Difference:
    """Compare what two finished jobs left, row by row and bit by bit."""
    ours, theirs = _rows(run_dir), dict(_rows(reference))
    times = Counter(index for index, _ in ours)
    return Difference(
        rows=len(ours),
        missing=len(theirs.keys() - times.keys()),
        duplicates=sum(times.values()) - len(times),
        different=sum(row != theirs.get(index) for index, row in ours),
        unclean=_unclean(run_dir, reference),
    )


def _rows(run_dir: Path) -> list[tuple[int, str]]:
    """(index, everything the row says as text that differs with every bit) of all rows that are there."""
    array = run_dir / "predictions.npy"
    if array.exists():
        manifest = json.loads((run_dir / "manifest.json").read_text())
        logits = np.load(array, mmap_mode="r")
        return [
            (index, logits[index - manifest["start"]].tobytes().hex() + part["reasons"].get(str(index), ""))
            for part in manifest["parts"]
            for index in range(part["first"], part["first"] + part["rows"])
        ]
    import pyarrow.parquet as pq

    tables = [pq.read_table(path, partitioning=None).to_pylist() for path in (run_dir / "predictions").iterdir()]
    # A float32 has one shortest text as a Python float, and -0.0 another than 0.0.
    return [(row["index"], repr(row)) for rows in tables for row in rows]


def _unclean(run_dir: Path, reference: Path) -> list[str]:
    # `next` names the folder itself.
    status, expected = (
        json.loads((path / "status.json").read_text()) | {"next": None} for path in (run_dir, reference)
    )
    manifest = json.loads((run_dir / "manifest.json").read_text())
    listed = {part["file"] for part in manifest["parts"]}
    found = {f"predictions/{path.name}" for path in run_dir.glob("predictions/*")}
    if (run_dir / "predictions.npy").exists():
        found.add("predictions.npy")
    checks = {
        f"status.json says {status}": status == expected and status["status"] == "complete",
        "manifest.json does not say complete": manifest["complete"],
        f"parts on one side only: {sorted(found ^ listed)}": found == listed,
        f"torn: {torn_parts(run_dir)}": not torn_parts(run_dir),
        "temporary files are left": not list(run_dir.rglob(".*.tmp")),
        "errors.jsonl differs": (run_dir / "errors.jsonl").read_bytes() == (reference / "errors.jsonl").read_bytes(),
    }
    return [text for text, fine in checks.items() if not fine]
