"""Models of the Hugging Face hub by real ranks, from a server that answers as the hub does, against transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.hf import NAMES, SIDE, processor_of, save_model
from tests.support.hubs import COMMIT, serve
from tests.support.runs import assert_proved, make_images, read_rows
from tests.support.starting import ranks, run


def test_two_ranks_give_what_transformers_gives_and_fetch_three_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, hub = tmp_path / "photos", tmp_path / "hub"
    make_images(root, 21)
    theirs = save_model(hub / "org" / "vit", "vit", "ViTForImageClassification")
    processor = processor_of("vit")(size=SIDE)
    processor.save_pretrained(hub / "org" / "vit")
    (hub / "org" / "vit" / "code.py").write_text("raise SystemExit('ran')")
    settings = ("data=folder", f"data.root={root}", "model=hf", "batch_size=4", "loader.workers=1")
    fields = "output.fields=[topk,logits,embedding]"
    with serve(hub, tmp_path / "cache", monkeypatch) as server:
        ended = run(ranks(2, *settings, "model.name=org/vit", fields, "output.dir=two"), tmp_path)
        assert ended.code == 0, ended.err
        asked = [file for file in server.asked if file.startswith("org/vit/")]
    files = ("config.json", "preprocessor_config.json", "model.safetensors")
    assert set(asked) == {f"org/vit/{file}" for file in files}

    rows = read_rows(tmp_path / "two")
    assert_proved(tmp_path / "two", 21)
    jpegs = [row for row in rows if row["path"].endswith(".jpg")]
    images = [Image.open(root / row["path"]).convert("RGB") for row in jpegs]
    with torch.inference_mode():
        pixels = torch.as_tensor(np.stack(processor(images)["pixel_values"]))
        logits = theirs(pixels).logits.numpy()
        tokens = theirs.vit(pixels).last_hidden_state[:, 0].numpy()
    assert np.allclose([row["logits"] for row in jpegs], logits, atol=1e-4)
    assert np.allclose([row["embedding"] for row in jpegs], tokens, atol=1e-4)
    assert [row["pred_name"] for row in rows] == [NAMES[row["pred"]] for row in rows]
    manifest = json.loads((tmp_path / "two" / "manifest.json").read_text())
    assert ended.summary["weights"] == manifest["weights"] == f"org/vit@{COMMIT}"
    assert "transformers" in manifest["versions"]

    # The cache has all of it, and one rank gives the same bits.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    alone = run(ranks(1, *settings, f"model.name=org/vit@{COMMIT}", fields, "output.dir=one"), tmp_path)
    assert alone.code == 0, alone.err
    assert read_rows(tmp_path / "one") == rows


def test_an_image_tower_gives_embeddings(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    paths = make_images(root, 9, classes=1)
    theirs = save_model(tmp_path / "clip", "clip", "CLIPModel")
    processor = processor_of("clip")(size=SIDE, crop_size=SIDE)
    processor.save_pretrained(tmp_path / "clip")
    settings = ("data=folder", f"data.root={root}", "model=hf", "model.name=clip", "batch_size=4", "loader.workers=1")
    ended = run(ranks(1, *settings, "output.fields=[embedding]", "output.format=npy", "output.dir=out"), tmp_path)
    assert ended.code == 0, ended.err
    pixels = np.stack(processor([Image.open(path).convert("RGB") for path in paths])["pixel_values"])
    with torch.inference_mode():
        wanted = theirs.get_image_features(torch.as_tensor(pixels))
    wanted = wanted if isinstance(wanted, torch.Tensor) else wanted.pooler_output
    assert np.allclose(np.load(tmp_path / "out" / "predictions.npy"), wanted.numpy(), atol=1e-4)
