"""What is decided and checked before a run folder is claimed."""

import json
import logging
import socket
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.models import get_model

from mgpu_ddp.config.schema import Config, OutputConfig
from mgpu_ddp.data.script_dataset import ItemKind, ScriptDataset
from mgpu_ddp.distributed.signals import StopWish
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import UsageError
from mgpu_ddp.infer import infer
from mgpu_ddp.job.cache import Kept
from mgpu_ddp.job.job import Job
from mgpu_ddp.job.setup import check_carried
from mgpu_ddp.output.columns import ColumnType
from mgpu_ddp.output.manifest import Manifest
from tests.support.runs import make_images, read_rows
from tests.support.worlds import folder, run_job, tiny

SQUEEZENET = "hub/checkpoints/squeezenet1_1-b8a52dc0.pth"
RANDOM_LINE = "WARNING: random weights: rows say nothing about the images (model.weights=DEFAULT takes trained ones)"


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch's own folder, with no weights in it, and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens on the discard port
    (tmp_path / "torch" / SQUEEZENET).parent.mkdir(parents=True)
    return tmp_path / "torch"


def put_weights(home: Path) -> None:
    """Put what stands for torchvision's weights where torch keeps them."""
    torch.manual_seed(7)
    torch.save(get_model("squeezenet1_1", weights=None).state_dict(), home / SQUEEZENET)


def over(data: Any, **model: Any) -> Config:
    return tiny(data=data, model={"weights": "auto", "num_classes": None} | model, limit=6)


def test_images_are_predicted_with_trained_weights(
    images: Path, tmp_path: Path, offline: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    put_weights(offline)
    summary = run_job(over(folder(images)), tmp_path / "run", world)
    assert summary["weights"] == "IMAGENET1K_V1"
    for name in ("manifest.json", "status.json"):
        assert json.loads((tmp_path / "run" / name).read_text())["weights"] == "IMAGENET1K_V1"
    assert "random weights" not in capsys.readouterr().out + (tmp_path / "run/report.html").read_text()


@pytest.mark.parametrize("data", ["fake", "folder"])
def test_random_weights_are_said_wherever_results_are(
    images: Path, tmp_path: Path, offline: Path, world: World, capsys: pytest.CaptureFixture[str], data: str
) -> None:
    """Fake data need none, and without a network there are none."""
    config = over(folder(images), weights=None) if data == "folder" else tiny(model={"weights": "auto"}, limit=6)
    summary = run_job(config, tmp_path / "run", world)
    assert summary["weights"] == "random"
    *table, last = capsys.readouterr().out.splitlines()
    assert RANDOM_LINE in table
    assert json.loads(last)["weights"] == "random"
    for name in ("manifest.json", "status.json"):
        assert json.loads((tmp_path / "run" / name).read_text())["weights"] == "random"
    assert RANDOM_LINE.removeprefix("WARNING: ") in (tmp_path / "run/report.html").read_text()
    assert "images_per_s" not in run_job(config, tmp_path / "run", world), "nothing is left to predict"
    assert RANDOM_LINE in capsys.readouterr().out


@pytest.mark.parametrize("begun", ["random", "before there was an auto", "IMAGENET1K_V1", "mine.pt"])
def test_a_run_folder_keeps_its_weights(images: Path, tmp_path: Path, offline: Path, world: World, begun: str) -> None:
    put_weights(offline)
    weights: str | None = {"IMAGENET1K_V1": "DEFAULT", "mine.pt": str(tmp_path / "mine.pt")}.get(begun)
    torch.save(get_model("squeezenet1_1", weights=None, num_classes=3).state_dict(), tmp_path / "mine.pt")
    first = replace(over(folder(images), weights=weights), limit=4)
    run_job(first, tmp_path / "run", world)
    manifest = Manifest.read(tmp_path / "run")
    assert manifest is not None
    if begun.startswith("before"):
        manifest.weights = None
        manifest.write(tmp_path / "run")
    summary = run_job(over(folder(images)), tmp_path / "run", world)
    assert (summary["rows"], Path(summary["weights"]).name) == (6, "random" if begun.startswith("before") else begun)


def test_jobs_of_one_process_have_weights_of_their_own(
    images: Path, tmp_path: Path, offline: Path, world: World
) -> None:
    """The same words choose others for other data, and for a folder that has its own."""
    put_weights(offline)
    kept = Kept()

    def weights_of(name: str, config: Config) -> Any:
        return infer(Job(name=name, config=config, run_dir=tmp_path / name), world, StopWish(), kept)["weights"]

    run_job(replace(over(folder(images), weights=None), limit=4), tmp_path / "begun", world)
    jobs = {"fake": over(tiny().data), "images": over(folder(images)), "begun": over(folder(images))}
    assert [weights_of(*each) for each in jobs.items()] == ["random", "IMAGENET1K_V1", "random"]


def test_without_a_network_one_line_names_the_file_and_its_place(
    images: Path, tmp_path: Path, offline: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, path = "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth", offline / SQUEEZENET
    said = (
        f"Put {url} at {path}, give a checkpoint of yours (model.weights=FILE.pt), or set model.weights=null for random"
        " ones."
    )

    def refused() -> str:
        with pytest.raises(UsageError) as raised:
            run_job(over(folder(images)), tmp_path / "run", world)
        return str(raised.value)

    assert refused().endswith(said)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        assert refused().endswith(said)
        assert time.monotonic() - began < 10
    assert not (tmp_path / "run").exists()


def test_other_classes_than_the_weights_have_ask_for_a_checkpoint(
    images: Path, tmp_path: Path, offline: Path, world: World
) -> None:
    with pytest.raises(UsageError, match=r"got 3\. Give a checkpoint of 3 classes \(model\.weights=FILE\.pt\)"):
        run_job(over(folder(images), num_classes=3), tmp_path / "run", world)


@pytest.mark.parametrize("name", ["index", "pred", "error", "logits"])
def test_what_a_dataset_carries_has_names_of_its_own(name: str) -> None:
    def setup(carried: str) -> Any:
        kind = ItemKind(image="pixels", carried={"path": "object", carried: "float64"})
        types = (ColumnType(name="logits", dtype="float32", shape=(3,)),)
        files = ScriptDataset(dataset=[], kind=kind, in_shards=False)
        return SimpleNamespace(files=files, types=types, job=SimpleNamespace(config=tiny()))

    check_carried(setup("taken"))
    with pytest.raises(UsageError, match=f"named otherwise than the columns error, .*, got '{name}'. Rename it."):
        check_carried(setup(name))


@pytest.mark.parametrize("form", ["parquet", "npy"])
def test_one_logit_tells_two_classes_apart(
    tmp_path: Path, world: World, form: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mgpu_ddp"), "propagate", True)
    caplog.set_level(logging.INFO, "mgpu_ddp")
    images = make_images(tmp_path / "photos", 12, classes=2)
    (tmp_path / "names.txt").write_text("class1\nclass0\n")
    model = {"num_classes": 1, "class_names": str(tmp_path / "names.txt")}
    config = tiny(data=folder(tmp_path / "photos"), model=model, output={"format": form})
    summary = run_job(config, tmp_path / "run", world)
    assert summary["predictions"] == [len(images), 1]
    assert "its sigmoid is the probability of class 1" in caplog.text
    run_job(replace(config, output=OutputConfig(format="npy")), tmp_path / "npy", world)
    logits = np.load(tmp_path / "npy" / "predictions.npy")
    pred = logits[:, 0] > 0
    labels = [path.parent.name == "class0" for path in sorted(images)]
    assert summary["accuracy"]["compared"] == len(images)
    assert summary["accuracy"]["top1"] == np.mean(pred == labels)
    if form == "parquet":
        rows = read_rows(tmp_path / "run")
        assert [row["pred"] for row in rows] == pred.tolist()
        assert [row["pred_name"] for row in rows] == [["class1", "class0"][int(one)] for one in pred]
        likely = 1 / (1 + np.exp(-np.abs(logits[:, 0])))
        assert np.allclose([row["prob"] for row in rows], likely)
