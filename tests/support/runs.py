"""Images to run over, the recipes of the docs, and the rows and the proof of a run folder."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mgpu_ddp.output.formats import FORMATS

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"


def make_images(root: Path, count: int, *, classes: int = 3, seed: int = 0) -> list[Path]:
    """Real JPEGs and PNGs of many sizes, smooth enough to look like photographs, in class folders."""
    random = np.random.default_rng(seed)
    paths = []
    for i in range(count):
        height, width = random.integers(20, 90, 2)
        coarse = random.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC)
        path = root / f"class{i % classes}" / f"image {i:04d}.{'png' if i % 4 == 3 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        paths.append(path)
    return paths


def recipes(page: str) -> list[str]:
    """The commands of docs/PAGE.md that a reader may copy, each to be run as it stands."""
    return re.findall(r"<!-- recipe -->\n```bash\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), re.DOTALL)


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """All rows of a run folder, in the order of the parts, whatever the format."""
    rows: list[dict[str, Any]] = []
    for path in sorted((run_dir / "predictions").iterdir()):
        if path.suffix == ".parquet":
            rows += pq.read_table(path).to_pylist()
        elif path.suffix == ".jsonl":
            rows += [json.loads(line) for line in path.read_bytes().splitlines()]
        else:
            import csv

            with path.open(newline="") as file:
                rows += list(csv.DictReader(file))
    return rows


def read_table(run_dir: Path) -> pa.Table:
    """The parts of a Parquet run as one table."""
    return pa.concat_tables(pq.read_table(path) for path in sorted((run_dir / "predictions").iterdir()))


def assert_proved(run_dir: Path, total: int, *, errors: int = 0) -> None:
    """The folder says that it is complete, and its rows are 0..total-1, once each, in order."""
    status = json.loads((run_dir / "status.json").read_text())
    assert status["status"] == "complete", status
    assert status["counts"] == {"total": total, "ok": total - errors, "error": errors, "missing": 0}
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert manifest["complete"]
    assert {p["file"] for p in manifest["parts"]} >= {f"predictions/{p.name}" for p in run_dir.glob("predictions/*")}
    if (run_dir / "predictions").is_dir():
        index = [
            i
            for part in sorted((run_dir / "predictions").iterdir())
            for i in FORMATS[part.suffix.lstrip(".")].columns(part, ["index"])["index"].to_pylist()
        ]
        assert index == list(range(total))
