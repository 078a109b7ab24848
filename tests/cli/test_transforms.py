"""Preprocessing by key, through the whole command: any source, any shape of input, and what a folder keeps of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from mgpu_ddp.config.schema import Config, FakeConfig, ModelConfig, TransformConfig
from mgpu_ddp.models.build import build_model
from mgpu_ddp.preprocess.transform import decode
from tests.support.runs import assert_proved, make_images, read_rows
from tests.support.samples import encoded, photo
from tests.support.starting import Ended, ranks, run, run_all

MODEL = ("model.name=squeezenet1_1", "model.num_classes=12", "batch_size=4", "loader.workers=1", "model.weights=null")
KEYS = ("transform.resize=50", "transform.crop=[48,32]", "transform.interpolation=bicubic", "transform.mean=0.5")
SHOWN = "resize shorter side to 50, bicubic, crop 48x32, mean 0.5 0.5 0.5, std "


def ended_well(ended: Ended, folder: Path, total: int) -> Any:
    assert ended.code == 0, ended.err
    assert_proved(folder, total)
    return ended.summary


def test_photos_of_every_kind_are_prepared_as_torchvision_does(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    sizes = [(1, 1), (2, 300), (300, 2), (37, 90), (91, 38), (48, 32), (50, 50), (333, 500)]
    kinds = ["PNG", "JPEG", "WEBP"]
    for i, (width, height) in enumerate(sizes):
        kind = kinds[i % 3]
        (tmp_path / "photos" / f"{i}.{kind.lower()}").write_bytes(encoded(photo(width, height, seed=i), kind))
    settings = ("data=folder", "data.root=photos", "output.format=npy", "output.dir=out")
    ended = run(ranks(2, *MODEL, *KEYS, *settings), tmp_path)
    summary = ended_well(ended, tmp_path / "out", len(sizes))
    assert summary["transform"] == f"{SHOWN}0.229 0.224 0.225"
    assert f"\npreprocessing: {summary['transform']}\n" in ended.out
    assert "transform=imagenet (" in ended.err
    reference = transforms.Compose(
        [
            transforms.Resize(50, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop((48, 32)),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.229, 0.224, 0.225]),
        ]
    )
    model = ModelConfig(name="squeezenet1_1", num_classes=12, weights=None)
    module = build_model(Config(data=FakeConfig(), transform=TransformConfig(), model=model)).module.eval()
    paths = sorted((tmp_path / "photos").iterdir())
    with torch.inference_mode():
        want = module(torch.stack([reference(decode(path.read_bytes())) for path in paths])).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "out" / "predictions.npy"), want, atol=1e-5)


def test_every_source_and_family_takes_inputs_that_are_no_squares(tmp_path: Path) -> None:
    paths = make_images(tmp_path / "photos", 6)
    stored = np.stack([np.asarray(Image.open(path).convert("RGB").resize((70, 60))) for path in paths])
    np.save(tmp_path / "photos.npy", stored)
    np.save(tmp_path / "exact.npy", stored[:, :48, :32])
    embeddings = ("output.fields=[embedding]", "output.format=npy")
    jobs = {
        "array": (*KEYS, "data=array", "data.path=../photos.npy"),
        "fake": (*KEYS, "data.size=6", "data.image_size=[1,30,90]", "transform.name=imagenet"),
        "timm": (*KEYS, *embeddings, "data=folder", "data.root=../photos", "model=timm", "model.name=test_resnet"),
        "exact": ("data=array", "data.path=../exact.npy", *KEYS[1:2], "transform.mean=0.5"),
    }
    for name in jobs:
        (tmp_path / name).mkdir()
    commands = [ranks(1, *MODEL, *settings, "output.dir=out") for settings in jobs.values()]
    for name, ended in zip(jobs, run_all(commands, [tmp_path / name for name in jobs]), strict=True):
        shown = "resize 48x32, bilinear, mean 0.5 0.5 0.5" if name == "exact" else SHOWN
        assert ended_well(ended, tmp_path / name / "out", 6)["transform"].startswith(shown), name


def test_another_transform_is_another_job_and_the_same_one_however_written_continues(tmp_path: Path) -> None:
    make_images(tmp_path / "photos", 6)
    settings = (*MODEL, "data=folder", "data.root=photos", "output.dir=out")
    assert run(ranks(1, *settings, *KEYS, "limit=3"), tmp_path).code == 0
    refused = run(ranks(1, *settings, "transform.crop=64"), tmp_path)
    assert refused.code == 2
    assert "with transform.crop=[48, 32] there, 64 here; transform.interpolation='bicubic' there" in refused.err
    same = ("transform.mean=[0.5,0.5,0.5]", "transform.resize=[50]", *KEYS[1:3])
    ended_well(run(ranks(1, *settings, *same), tmp_path), tmp_path / "out", 6)


def test_sweeps_over_sizes_and_lists(tmp_path: Path) -> None:
    sizes = ("data.size=8", "data.image_size=[3,9,9]", "output.dir=null", "hydra.sweep.dir=swept")
    swept = ("transform.resize=[32,40],[40,32]", "transform.interpolation=nearest,lanczos")
    ended = run(ranks(1, *MODEL, *sizes, *swept, "-m"), tmp_path)
    assert ended.code == 0, ended.err
    assert (ended.summary["jobs"], ended.summary["failed"]) == (4, 0)
    assert "was not written" not in ended.err
    rows = json.loads((tmp_path / "swept" / "sweep.json").read_text())["jobs"]
    assert [row["values"]["transform.resize"] for row in rows] == ["[32, 40]"] * 2 + ["[40, 32]"] * 2
    assert len({json.dumps(read_rows(tmp_path / "swept" / str(job))) for job in range(4)}) == 4


REFUSED = {
    "transform.std=[0.2,0,0.2]": "transform.std must be three numbers from 1e-06 to 1, or one for all channels, got",
    "transform.mean=0.4,0.4,0.4": "transform.mean must be one value, got 'transform.mean=0.4,0.4,0.4'. Add --multirun",
    "transform.crop=999": "transform.crop must be within the resized image (224x224), got 999.",
    "transform.resize=[1,99999999]": "transform.resize must be at most 89,478,485 pixels, got [1, 99999999]. Lower it.",
    "transform.resize={a:8}": "transform.resize must be one whole number or [height,width], each at least 1, or auto",
}


def test_a_mistake_is_one_line_once(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(len(REFUSED))]
    for folder in folders:
        folder.mkdir()
    results = run_all([ranks(2, *MODEL, word) for word in REFUSED], folders)
    for ended, folder, line in zip(results, folders, REFUSED.values(), strict=True):
        assert ended.code == 2, ended.err
        (said,) = [line for line in ended.err.splitlines() if "mgpu_ddp: " in line]
        assert said.startswith(f"mgpu_ddp: {line}")
        assert "Traceback" not in ended.err
        assert not (folder / "outputs").exists()


@pytest.mark.parametrize("keys", [("transform.crop=[224,96]",), ("transform.resize=[96,96]", "transform.crop=null")])
def test_a_model_of_one_size_says_which_key_is_wrong(tmp_path: Path, keys: tuple[str, ...]) -> None:
    settings = ("model.name=vit_b_16", "data.size=4", "transform.name=imagenet", "dry_run=true")
    ended = run(ranks(1, *settings, *keys), tmp_path)
    assert ended.code == 2, ended.err
    name = keys[0].partition("=")[0]
    said = next(line for line in ended.err.splitlines() if line.startswith("mgpu_ddp: "))
    assert said.startswith(f"mgpu_ddp: {name} must be a size that vit_b_16 takes, got ")
    assert said.endswith(f"Try {name}={'224' if name.endswith('crop') else '[224,224]'}.")
