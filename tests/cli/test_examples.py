"""Every example on a few images: its rows are those of a plain loop."""

import re
import runpy
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import timm
import torch
from nbclient import NotebookClient
from PIL import Image
from torch import nn
from torchvision.models import get_model
from torchvision.transforms._presets import ImageClassification

from tests.support.runs import assert_proved, make_images, read_rows
from tests.support.starting import TIMEOUT_S, ranks, run, script_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
SETTINGS = ("batch_size=2", "loader.workers=1", "output.dir=out")
IMAGES = 9


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("examples") / "photos"
    make_images(root, IMAGES)
    return root


def looped(module: nn.Module, transform: Callable[[Image.Image], Any], photos: Path) -> dict[str, Any]:
    """Return what a module does for each image, by path, in a loop that takes one after the other."""
    found = {}
    for path in sorted(path for path in photos.rglob("*") if path.is_file()):
        with torch.inference_mode(), Image.open(path) as image:
            found[str(path.relative_to(photos))] = module.eval()(transform(image.convert("RGB"))[None])
    return found


def save(module: nn.Module, path: Path) -> str:
    torch.save(module.state_dict(), path)
    return str(path)


def test_examples_are_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert path.read_text().count("\n") < 50, path.name


def test_own_model(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = EXAMPLES / "own_model.py"
    torch.manual_seed(1)
    module = runpy.run_path(str(path))["Photo"]()
    monkeypatch.setenv("CHECKPOINT", save(module, tmp_path / "photo.pt"))
    settings = ("data=folder", f"data.root={photos}", "transform.size=56", *SETTINGS)
    ended = run(script_ranks(2, path, *settings), tmp_path)
    assert ended.code == 0, ended.err
    assert_proved(tmp_path / "out", IMAGES)
    expected = looped(module, ImageClassification(crop_size=56, resize_size=64), photos)
    for row in read_rows(tmp_path / "out"):
        wanted = expected.pop(row["path"])
        assert row["subject"] == wanted["subject"]
        assert row["weather"] == pytest.approx(wanted["weather"][0].tolist(), abs=1e-5)
        assert row["quality"] == pytest.approx(wanted["quality"].item(), abs=1e-5)
    assert not expected


def test_detector(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    module = get_model("ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None)
    # Random weights are as sure of one box as of another, until the statistics of batches are there.
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    blocks = torch.rand(4, 3, 5, 5).repeat_interleave(64, 2).repeat_interleave(64, 3)
    with torch.no_grad():
        module.train().head(list(module.backbone(blocks).values()))
    monkeypatch.setenv("DETECTOR", "ssdlite320_mobilenet_v3_large")
    monkeypatch.setenv("CHECKPOINT", save(module, tmp_path / "detector.pt"))
    monkeypatch.setenv("SIZE", "160")
    ended = run(script_ranks(2, EXAMPLES / "detector.py", "data=folder", f"data.root={photos}", *SETTINGS), tmp_path)
    assert ended.code == 0, ended.err
    assert_proved(tmp_path / "out", IMAGES)
    no_change = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    expected = looped(module, ImageClassification(crop_size=160, resize_size=160, **no_change), photos)
    counts = set()
    for row in read_rows(tmp_path / "out"):
        (wanted,) = expected.pop(row["path"])
        likely = wanted["scores"] > 0.5
        counts.add(len(row["scores"]))
        assert row["labels"] == wanted["labels"][likely].tolist()
        assert np.allclose(row["scores"], wanted["scores"][likely], atol=1e-4)
        assert np.allclose(np.reshape(row["boxes"], (-1, 4)), wanted["boxes"][likely], atol=0.05)
    assert not expected
    assert len(counts) > 1, "rows of one length prove little"


def test_own_data(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = sorted(photos.rglob("*.jpg"))
    table = [(f"photo {i}", path.read_bytes(), i % 3, 2000 + i) for i, path in enumerate(paths)]
    broken = ("the broken one", b"no JPEG", 1, 1999)
    with closing(sqlite3.connect(tmp_path / "photos.sqlite")) as connection:
        connection.execute("CREATE TABLE photos (id TEXT PRIMARY KEY, jpeg BLOB, species INTEGER, taken INTEGER)")
        connection.executemany("INSERT INTO photos VALUES (?, ?, ?, ?)", [*table, broken])
        connection.commit()
    monkeypatch.setenv("PHOTOS", str(tmp_path / "photos.sqlite"))
    torch.manual_seed(3)
    module = get_model("squeezenet1_1", num_classes=12)
    model = ("model.name=squeezenet1_1", f"model.weights={save(module, tmp_path / 'mine.pt')}")
    settings = (*model, "transform.size=56", "loader.workers=2", *SETTINGS)
    ended = run(script_ranks(2, EXAMPLES / "own_data.py", *settings, "output.fields=[logits]"), tmp_path)
    assert ended.code == 0, ended.err
    assert_proved(tmp_path / "out", len(table) + 1, errors=1)
    expected = looped(module, ImageClassification(crop_size=56, resize_size=64), photos)
    by_path = {path: str(path.relative_to(photos)) for path in paths}
    last, *rows = sorted(read_rows(tmp_path / "out"), key=lambda row: row["error"] is None)
    assert (last["path"], last["label"], last["taken"]) == (broken[0], 1, 1999)
    assert "UnidentifiedImageError" in last["error"]
    for (key, _, species, taken), path, row in zip(table, paths, rows, strict=True):
        assert (row["path"], row["label"], row["taken"]) == (key, species, taken)
        assert row["logits"] == pytest.approx(expected[by_path[path]][0].tolist(), abs=1e-4)
    assert ended.summary["accuracy"]["compared"] == len(table)


def test_embed_and_search(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    module = timm.create_model("test_vit")
    weights = save(module, tmp_path / "vit.pt")
    path = EXAMPLES / "embed_and_search.py"
    (embed,) = re.findall(r"mgpu-infer (.*?)\npython", path.read_text(), re.DOTALL)
    named = ("model.name=vit_small_patch16_224.augreg_in21k_ft_in1k", "data.root=photos")
    words = [word for word in embed.split() if word not in (*named, "\\")]
    words += ["model.name=test_vit", f"model.weights={weights}", f"data.root={photos}", "loader.workers=1"]
    ended = run(ranks(1, *words), tmp_path)
    assert ended.code == 0, ended.err
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=module), is_training=False)
    module.reset_classifier(0)
    found = looped(module, transform, photos)
    features = {name: vector[0] / vector.norm() for name, vector in found.items()}
    wanted = sorted(features)[3]
    nearest = sorted(features, key=lambda name: -float(features[name] @ features[wanted]))[:6]

    monkeypatch.setenv("MPLBACKEND", "agg")
    ended = run(script_ranks(1, path, "embedded", str(photos), wanted, "neighbours.png"), tmp_path)
    assert ended.code == 0, ended.err
    said = [line.split("  ", 1) for line in ended.out.splitlines()]
    assert [name for _, name in said] == nearest
    similarities = [float(features[name] @ features[wanted]) for name in nearest]
    assert [float(number) for number, _ in said] == pytest.approx(similarities, abs=1e-3)
    with Image.open(tmp_path / "neighbours.png") as picture:
        assert picture.size == (1200, 250)


def test_notebook(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "photos").symlink_to(photos)
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    NotebookClient(notebook, timeout=TIMEOUT_S, resources={"metadata": {"path": str(tmp_path)}}).execute()
    results = {cell.source: cell.outputs[-1].data["text/plain"] for cell in notebook.cells if cell.get("outputs")}
    assert_proved(tmp_path / "out", IMAGES)
    assert results['run.summary["rows"], run.summary["errors"]'] == f"({IMAGES}, 0)"
    assert results['mgpu_ddp.open("out").summary == run.summary'] == "True"
    torch.manual_seed(0)
    expected = looped(get_model("resnet18", weights=None), ImageClassification(crop_size=224), photos)
    for row in read_rows(tmp_path / "out"):
        probs = expected.pop(row["path"])[0].softmax(0)
        assert (row["pred"], row["prob"]) == (probs.argmax(), pytest.approx(probs.max().item(), abs=1e-5))
    assert not expected
