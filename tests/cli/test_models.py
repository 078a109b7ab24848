"""timm's models under real torchrun: the recipe of docs/models.md, and weights from the hub's cache against timm."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

from tests.support.runs import assert_proved, make_images, read_rows, recipes
from tests.support.starting import BIN, TIMEOUT_S, ranks, run


@pytest.mark.slow
def test_the_recipes_run(tmp_path: Path) -> None:
    commands = recipes("models")
    assert all(command.count("\n") <= 10 for command in commands)
    images = make_images(tmp_path / "photos", 12)
    environ = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    for command in commands:
        subprocess.run(["bash", "-euc", command], cwd=tmp_path, env=environ, timeout=TIMEOUT_S, check=True)
    assert_proved(tmp_path / "by-checkpoint", len(images))
    assert {row["pred"] for row in read_rows(tmp_path / "by-checkpoint")} <= {0, 1, 2}
    assert_proved(tmp_path / "by-timm", len(images))
    assert {row["pred_name"] for row in read_rows(tmp_path / "by-timm")} <= {"cat", "dog", "neither"}
    assert_proved(tmp_path / "by-folder", len(images))
    assert {row["pred_name"] for row in read_rows(tmp_path / "by-folder")} <= {"cat", "dog"}
    assert_proved(tmp_path / "by-names", len(images))
    assert {row["pred_name"] for row in read_rows(tmp_path / "by-names")} <= {"cat", "dog", "neither"}
    assert_proved(tmp_path / "by-hf", len(images))
    assert {row["pred_name"] for row in read_rows(tmp_path / "by-hf")} <= {"cat", "dog"}


def test_weights_of_the_hub_give_what_timm_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache = tmp_path / "photos", tmp_path / "hub"
    make_images(root, 21)
    torch.manual_seed(5)
    theirs = timm.create_model("test_resnet").eval()
    # The hub's cache as it looks after a download.
    repository = cache / "models--timm--test_resnet.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    (repository / "snapshots" / "0123").mkdir(parents=True)
    save_file(theirs.state_dict(), repository / "snapshots" / "0123" / "model.safetensors")
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = ("data=folder", f"data.root={root}", "model=timm", "model.name=test_resnet")
    settings += ("batch_size=4", "loader.workers=1", "runtime.decode=cpu", "output.fields=[topk,logits]")
    ended = run(ranks(2, *settings, "output.dir=two"), tmp_path)
    assert ended.code == 0, ended.err
    rows = read_rows(tmp_path / "two")
    transform = create_transform(**resolve_data_config(model=theirs), is_training=False)
    jpegs = [row for row in rows if row["path"].endswith(".jpg")][:8]
    images = torch.stack([transform(Image.open(root / row["path"]).convert("RGB")) for row in jpegs])
    with torch.inference_mode():
        logits = theirs(images).numpy()
    assert np.allclose([row["logits"] for row in jpegs], logits, atol=1e-4)
    assert all(row["pred_name"] for row in rows)
    assert ended.summary["weights"] == "timm/test_resnet.r160_in1k"
    again = run(ranks(1, *settings, "output.dir=two", "limit=21"), tmp_path)
    assert (again.code, again.summary["weights"]) == (0, "timm/test_resnet.r160_in1k")

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    missing = run(ranks(1, *settings, "output.dir=none"), tmp_path)
    assert missing.code == 2
    assert "model.weights must be on this machine or reachable, got 'DEFAULT'" in missing.err
    url = "https://huggingface.co/timm/test_resnet.r160_in1k/resolve/main/model.safetensors"
    assert f"Fetch {url} where there is a network and give its path" in missing.err
    assert f"copy models--timm--test_resnet.r160_in1k from its cache to {tmp_path}" in missing.err
    assert not (tmp_path / "none").exists()
