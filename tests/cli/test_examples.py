"""Every example on a few images: its rows are those of a plain loop."""

import re
import runpy
import sqlite3
import sys
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
from tests.support.zero_shot import plain, save_classes

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


def detector_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A small detector of random weights, which examples/detector.py will take."""
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
    monkeypatch.setenv("CHECKPOINT", save(module, folder / "detector.pt"))
    monkeypatch.setenv("SIZE", "160")
    return module


def test_detector(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = detector_in(tmp_path, monkeypatch)
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


def test_crops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector_in(tmp_path, monkeypatch)
    photos = tmp_path / "photos"
    make_images(photos, 2)
    torch.manual_seed(5)
    module = get_model("squeezenet1_1").eval()
    monkeypatch.setenv("CLASSIFIER", "squeezenet1_1")
    monkeypatch.setenv("WEIGHTS", save(module, tmp_path / "classifier.pt"))
    ended = run([sys.executable, str(EXAMPLES / "crops.py"), str(photos), "out"], tmp_path)
    assert ended.code == 0, ended.err
    found, crops = (read_rows(tmp_path / "out" / name) for name in ("found", "crops"))
    assert ended.out.splitlines()[-1] == f"2 images, {len(crops)} crops"
    wanted = []
    for row in found:
        with Image.open(photos / row["path"]) as image:
            assert (row["width"], row["height"]) == image.size
            scale = min(image.size) / 160
            # Torchvision cuts what is left of a side, so that the longer one is resized a little differently.
            longer = int(160 * max(image.size) / min(image.size))
            sizes = [160 if side == min(image.size) else longer for side in image.size]
            offsets = [round((size - 160) / 2) for size in sizes]
            scales = [side / size for side, size in zip(image.size, sizes, strict=True)]
            assert max(abs(each - scale) for each in scales) < 0.1 * scale
            for x0, y0, x1, y1 in row["boxes"]:
                corners = [(x0 + offsets[0]) * scales[0], (y0 + offsets[1]) * scales[1]]
                corners += [(x1 + offsets[0]) * scales[0], (y1 + offsets[1]) * scales[1]]
                wanted.append((row["path"], corners))
    assert len(wanted) == len(crops) > 2
    transform = ImageClassification(crop_size=224, resize_size=256)
    for number, (row, (path, box)) in enumerate(zip(crops, wanted, strict=True)):
        assert row["path"] == path
        assert row["box"] == pytest.approx(box, abs=1e-3)
        with Image.open(photos / path) as image:
            limits = [*image.size] * 2
            x0, y0, x1, y1 = (min(max(round(value), 0), limit) for value, limit in zip(row["box"], limits, strict=True))
            assert (x0 < x1 and y0 < y1) == (row["error"] is None), row
            if row["error"] is None and number % 8 == 0:
                with torch.inference_mode():
                    logits = module(transform(image.convert("RGB").crop((x0, y0, x1, y1)))[None])[0]
                assert row["prob"] == pytest.approx(logits.softmax(0).max().item(), abs=1e-5)


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


def tiny_clip(folder: Path) -> Any:
    """A CLIP of random weights, of width 24, and its tokenizer, as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=32
    )
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    text = tower | ends | {"vocab_size": len(words), "max_position_embeddings": 32}
    vision = tower | {"image_size": 32, "patch_size": 16}
    torch.manual_seed(6)
    config = transformers.CLIPConfig(projection_dim=24, text_config=text, vision_config=vision)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.mark.slow
def test_zero_shot(tmp_path: Path, photos: Path) -> None:
    clip, tokenizer = tiny_clip(tmp_path / "clip")
    (tmp_path / "names.txt").write_text("cat\ndog\ntraffic light\n")
    path = EXAMPLES / "zero_shot.py"
    ended = run(script_ranks(1, path, "clip", "names.txt", "classes.safetensors"), tmp_path)
    assert ended.code == 0, ended.err
    directions = []
    for name in ("cat", "dog", "traffic light"):
        rows = []
        for template in runpy.run_path(str(path))["TEMPLATES"]:
            # One text, which is not padded.
            with torch.inference_mode():
                returned = clip.get_text_features(**tokenizer([template.format(name)], return_tensors="pt"))
            rows.append(returned.pooler_output[0] / returned.pooler_output[0].norm())
        directions.append(torch.stack(rows).mean(dim=0))
    classes = {"embeddings": torch.stack(directions), "logit_scale": clip.logit_scale.detach().exp()}

    small = ("model=hf", "model.name=clip", "transform=imagenet", "transform.size=32")
    settings = (*small, "model.zero_shot=classes.safetensors", "output.fields=[embedding,logits]", *SETTINGS)
    ended = run(ranks(1, "data=folder", f"data.root={photos}", *settings), tmp_path)
    assert ended.code == 0, ended.err
    rows = read_rows(tmp_path / "out")
    logits = plain(torch.tensor([row["embedding"] for row in rows]), classes)
    assert torch.allclose(torch.tensor([row["logits"] for row in rows]), logits, atol=1e-4)
    assert {row["pred_name"] for row in rows} <= {"cat", "dog", "traffic light"}
    # A classifier has classes of its own, and a file of another tower another width.
    other = save_classes(tmp_path / "other.safetensors", width=25)[0]
    ended = run(ranks(1, "data=folder", f"data.root={photos}", *small, f"model.zero_shot={other}", *SETTINGS), tmp_path)
    assert ended.code == 2
    assert "model.zero_shot must be a file of width 24, which the model returns, got" in ended.err


@pytest.mark.slow
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
