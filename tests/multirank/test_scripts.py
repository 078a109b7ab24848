"""Models, datasets and columns of the user's own: W ranks give the rows of one rank and of a plain loop."""

import importlib
import json
import os
import signal
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from mgpu_ddp.config.schema import FakeConfig
from mgpu_ddp.data.fake import FakeSamples
from tests.support.runs import assert_proved, make_images, read_rows, read_table
from tests.support.starting import Ended, committed_rows, run, run_all, script_ranks, started, wait_until

SCRIPTS = Path(__file__).parents[1] / "support" / "brought"
SIZE = 32
N = 45
FAKE = (f"data.size={N}", f"data.image_size=[3,{SIZE},{SIZE}]", f"transform.size={SIZE}", "batch_size=4")
WORKERS = "loader.workers=1"


def out_of(command: Any, cwd: Path) -> Path:
    """Run a command that should succeed; the run folder is `out` in its working folder."""
    cwd.mkdir(exist_ok=True)
    done = run(command, cwd)
    assert done.code == 0, done.err
    return cwd / "out"


def script(name: str, size: int, *settings: str, **environ: str) -> Any:
    return script_ranks(size, SCRIPTS / f"{name}.py", *settings, "output.dir=out", WORKERS, **environ)


def by_plain_loop(name: str, images: torch.Tensor) -> Any:
    """Return what the script's own model does for one batch."""
    module = importlib.import_module(f"tests.support.brought.{name}")
    with torch.inference_mode():
        found = module.build().eval()(images)
        return module.outputs(found) if hasattr(module, "outputs") else found


def fake_images() -> torch.Tensor:
    dataset = FakeSamples(FakeConfig(size=N, image_size=[3, SIZE, SIZE]))
    from mgpu_ddp.preprocess.transform import plain

    pixels = [dataset.load(i, plain(SIZE), lambda stage, spent_s: None)[0] for i in range(N)]
    return torch.stack([transforms.functional.to_tensor(np.ascontiguousarray(each)) for each in pixels])


@pytest.mark.parametrize("name", ["classes", "heads", "detector"])
def test_any_number_of_ranks_gives_the_rows_of_one(name: str, tmp_path: Path) -> None:
    folders = [out_of(script(name, size, *FAKE), tmp_path / str(size)) for size in (1, 2, 3)]
    first, *others = [read_table(folder) for folder in folders]
    assert first.num_rows == N
    assert all(other.equals(first) for other in others)
    for folder in folders:
        assert_proved(folder, N)


def test_named_outputs_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    table = read_table(out_of(script("heads", 2, *FAKE), tmp_path))
    expected = by_plain_loop("heads", fake_images())
    assert table.schema.field("kind").type == "int64"
    assert table.schema.field("is_sure").type == "bool"
    assert json.loads(table.schema.field("mask").metadata[b"shape"]) == [2, 3, 4]
    assert table["kind"].to_pylist() == expected["kind"].tolist()
    assert table["is_sure"].to_pylist() == expected["is_sure"].tolist()
    assert np.allclose(table["features"].to_pylist(), expected["features"], atol=1e-5)
    assert np.abs(np.array(table["mask"].to_pylist(), int) - expected["mask"].flatten(1).numpy().astype(int)).max() <= 1


def test_detections_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    table = read_table(out_of(script("detector", 2, *FAKE), tmp_path))
    expected = by_plain_loop("detector", fake_images())
    lengths = {len(row["scores"]) for row in expected}
    assert len(lengths) > 3
    assert table["boxes"].to_pylist() == [row["boxes"].tolist() for row in expected]
    assert table["labels"].to_pylist() == [row["labels"].tolist() for row in expected]
    for mine, row in zip(table["scores"].to_pylist(), expected, strict=True):
        assert np.allclose(mine, row["scores"], atol=1e-5)


@pytest.mark.parametrize("how", ["csv", "jsonl"])
@pytest.mark.parametrize("name", ["heads", "detector"])
def test_text_holds_lists_as_json(name: str, how: str, tmp_path: Path) -> None:
    expected = read_table(out_of(script(name, 1, *FAKE), tmp_path / "parquet")).to_pylist()
    found = read_rows(out_of(script(name, 2, *FAKE, f"output.format={how}"), tmp_path / how))
    for row, other in zip(found, expected, strict=True):
        for key, value in other.items():
            text = json.loads(row[key]) if how == "csv" and key not in ("path", "error") and row[key] else row[key]
            assert (text or None) == value or np.array_equal(np.float32(text), np.float32(value)), key


def test_one_tensor_of_fixed_shape_goes_into_an_array(tmp_path: Path) -> None:
    (tmp_path / "maps.py").write_text(
        "import mgpu_ddp\nfrom tests.support.brought.heads import Heads\n"
        "mgpu_ddp.main(model=Heads, outputs=lambda found: {'mask': found['mask']})\n"
    )
    settings = (*FAKE, "output.format=npy", "output.dtype=fp16", "output.dir=out", WORKERS)
    folder = out_of(script_ranks(2, tmp_path / "maps.py", *settings), tmp_path)
    array = np.load(folder / "predictions.npy")
    assert (array.shape, array.dtype) == ((N, 2, 3, 4), np.float16)
    module = importlib.import_module("tests.support.brought.heads")
    assert np.allclose(array, module.Heads().eval()(fake_images())["mask"].detach(), atol=2e-3)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A database of 30 images; rows 3 and 20 cannot be read, the image of row 11 is broken."""
    path = tmp_path / "photos.db"
    paths = make_images(tmp_path / "images", 30)
    with sqlite3.connect(path) as connection:
        connection.execute("create table photos (id integer, key, image, label, weight, caption)")
        for i, image in enumerate(paths):
            caption = "gone" if i in (3, 20) else None if i == 5 else f"photo {i} ☃"
            data = b"broken" if i == 11 else image.read_bytes()
            connection.execute(
                "insert into photos values (?, ?, ?, ?, ?, ?)", (i, f"k/{i}", data, i % 7, i / 2, caption)
            )
    return path


def rows_of_photos(photos: Path) -> list[dict[str, Any]]:
    """The row that the table must have for each photo, the prediction apart."""
    with sqlite3.connect(photos) as connection:
        return [
            dict(zip(("index", "path", "label", "weight", "caption"), row, strict=True))
            for row in connection.execute("select id, key, label, weight, caption from photos order by id")
        ]


def test_a_dataset_brings_keys_labels_and_scalars(photos: Path, tmp_path: Path) -> None:
    settings = ("batch_size=4", "transform.size=32")
    tables = [
        read_table(out_of(script("items", size, *settings, PHOTOS=str(photos)), tmp_path / str(size)))
        for size in (1, 2)
    ]
    assert tables[0].equals(tables[1])
    assert_proved(tmp_path / "2" / "out", 30, errors=3)
    for row, expected in zip(tables[0].to_pylist(), rows_of_photos(photos), strict=True):
        known = {key: row[key] for key in expected}
        if row["index"] in (3, 20):
            assert known == {"index": row["index"], "path": None, "label": None, "weight": None, "caption": None}
            assert row["error"] == f"FileNotFoundError: k/{row['index']} is gone"
        else:
            assert known == expected
            assert (row["error"] is not None) == (row["index"] == 11)


def test_error_rows_of_a_dataset_are_predicted_again(photos: Path, tmp_path: Path) -> None:
    settings = ("batch_size=4", "transform.size=32")
    folder = out_of(script("items", 2, *settings, PHOTOS=str(photos)), tmp_path)
    before = read_table(folder)
    with sqlite3.connect(photos) as connection:
        connection.execute("update photos set caption = 'back' where id = 3")
    out_of(script("items", 1, *settings, "retry_failed=true", PHOTOS=str(photos)), tmp_path)
    after = read_table(folder)
    assert_proved(folder, 30, errors=2)
    assert (after["path"][3].as_py(), after["caption"][3].as_py()) == ("k/3", "back")
    others = np.delete(np.arange(30), 3)
    assert after.take(others).equals(before.take(others))


def test_a_dataset_may_grow_at_its_end(photos: Path, tmp_path: Path) -> None:
    settings = ("batch_size=4", "transform.size=32")
    folder = out_of(script("items", 2, *settings, PHOTOS=str(photos)), tmp_path)
    with sqlite3.connect(photos) as connection:
        connection.execute(
            "insert into photos select id + 30, key || 'b', image, label, weight, 'new' from photos where id < 3"
        )
    out_of(script("items", 1, *settings, PHOTOS=str(photos)), tmp_path)
    assert_proved(folder, 33, errors=3)
    assert read_table(folder)["path"].to_pylist()[30:] == ["k/0b", "k/1b", "k/2b"]
    with sqlite3.connect(photos) as connection:
        connection.execute("delete from photos where id > 10")
    refused = run(script("items", 1, *settings, PHOTOS=str(photos)), tmp_path)
    assert refused.code == 2
    assert "samples=[0, 33] there, [0, 11] here" in refused.err


def test_tensors_of_any_shape_reach_the_model_as_they_are(tmp_path: Path) -> None:
    folder = out_of(script("tensors", 2, "batch_size=4", "output.fields=[topk,logits]"), tmp_path)
    module = importlib.import_module("tests.support.brought.tensors")
    expected = module.build()(module.Tensors().noise).detach()
    assert np.allclose(read_table(folder)["logits"].to_pylist(), expected, atol=1e-6)


def test_a_detector_that_is_killed_goes_on_at_another_size(tmp_path: Path) -> None:
    """The table of a run that was killed three times is that of one that was not."""
    settings = ("data.size=400", *FAKE[1:], "output.commit_every=24")
    whole = read_table(out_of(script("detector", 1, *settings), tmp_path / "whole"))
    cwd = tmp_path / "killed"
    cwd.mkdir()
    for size, least in ((2, 24), (1, 72), (3, 120)):
        with started(script("detector", size, *settings), cwd) as process:
            wait_until(lambda least=least: committed_rows(cwd / "out") >= least, process)
            for rank in process.ranks:
                os.kill(rank.pid, signal.SIGKILL)
            process.wait()
    out_of(script("detector", 2, *settings), cwd)
    assert_proved(cwd / "out", 400)
    assert read_table(cwd / "out").equals(whole)


def test_a_transform_of_the_users_runs_in_the_workers(tmp_path: Path) -> None:
    make_images(tmp_path / "photos", 9)
    (tmp_path / "mine.py").write_text(
        "import mgpu_ddp\nfrom torchvision import transforms as t\nfrom tests.support.brought.classes import build\n"
        "mgpu_ddp.main(model=build, transform=lambda: t.Compose([t.Resize((24, 20)), t.Grayscale(3), t.ToTensor()]))\n"
    )
    settings = ("data=folder", "data.root=photos", "batch_size=4", "output.fields=[logits]", "output.dir=out", WORKERS)
    table = read_table(out_of(script_ranks(2, tmp_path / "mine.py", *settings), tmp_path))
    mine = transforms.Compose([transforms.Resize((24, 20)), transforms.Grayscale(3), transforms.ToTensor()])
    paths = [tmp_path / "photos" / path for path in table["path"].to_pylist()]
    images = [mine(Image.open(path).convert("RGB")) for path in paths]
    assert np.allclose(table["logits"].to_pylist(), by_plain_loop("classes", torch.stack(images)), atol=1e-5)


REFUSED = {
    "model=lambda: 1 / 0": "model: the function raised ZeroDivisionError: division by zero (mine.py, line 6). Fix it",
    "model=lambda: 'resnet18'": "model must be a function that returns an nn.Module, got 'resnet18' from it.",
    "model=build()": "model must be a function, got Net. Pass one that makes it: model=lambda: ...",
    "model=build, outputs=lambda found: 3": "model: forward, or outputs, must return a Tensor of logits (B, C), a dict",
    "model=build, outputs=lambda found: {}": "got dict {}. Correct what forward, or outputs=, returns.",
    "model=build, outputs=lambda found: {'a': found[:1]}": "got dict {'a': float32 Tensor (1, 7)}",
    "model=build, outputs=lambda found: {'pred': found}": "a column's name must be text other than index, path, label",
    "model=build, outputs=lambda found: found.nope": "raised AttributeError: 'Tensor' object has no",
    "model=build, version=2": "version must be text, got 2.",
    "model=build, transform=lambda: 3": "transform must be a function that returns a transform",
    "model=build, transform=lambda: lambda image: image": "returns a float Tensor (3, H, W), got 'Image'",
    "model=build, transform=lambda: t.ToTensor()": "Tensors of one shape, got '(3, 240, 320) and (3, 300, 200)'",
    "model=build, transform=lambda: t.PILToTensor()": "got 'uint8 (3, 240, 320)'",
    "model=build, dataset=Stream": "dataset must have items by index, got Stream: without an index no row can be told",
    "model=build, dataset=lambda: iter([])": "dataset must have items by index, got list_iterator",
    "model=build, dataset=lambda: ['a', 'b']": "the item must be a PIL image, a uint8 array",
    "model=build, dataset=lambda: 1 / 0": "dataset: the function raised ZeroDivisionError",
    "model=build, dataset=lambda: [1]": "the item must be a PIL image",
    "model=lambda: torch.nn.Conv2d(5, 2, 1)": "raised RuntimeError: Given groups=1",
}


@pytest.mark.parametrize(("arguments", "line"), REFUSED.items())
def test_what_cannot_be_used_is_told_in_one_line(arguments: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch, mgpu_ddp\nfrom torchvision import transforms as t\n"
        "from tests.support.brought.classes import build\n"
        f"class Stream(torch.utils.data.IterableDataset):\n    __iter__ = None\nmgpu_ddp.main({arguments})\n"
    )
    settings = ["batch_size=4"] if "dataset" in arguments else FAKE
    settings = [setting for setting in settings if "transform" not in arguments or "transform" not in setting]
    done = run(script_ranks(1, tmp_path / "mine.py", *settings, "output.dir=out"), tmp_path)
    assert done.code == 2
    told = [each for each in done.err.splitlines() if each.startswith("mgpu_ddp: ")]
    assert len(told) == 1, done.err
    assert line in told[0]
    assert not (tmp_path / "out").exists()


MIDWAY = """
import torch, mgpu_ddp
from torch import nn

class Net(nn.Module):
    calls = 0
    def forward(self, images):
        Net.calls += len(images) == 4
        means = images.mean(dim=(1, 2, 3))
        return {"mean": means if Net.calls < 6 else means.int()}

class Raises(Net):
    def forward(self, images):
        assert Net.calls < 5, "five batches are enough"
        return super().forward(images)

class Columns(Net):
    def forward(self, images):
        found = super().forward(images)
        return found if Net.calls < 6 else 7

mgpu_ddp.main(model=NAME)
"""


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("Net", "mean int32 (), but at the start mean float32 ()"),
        ("Columns", "got int"),
        ("Raises", "AssertionError: five batches are enough"),
    ],
)
def test_a_forward_that_changes_its_columns_ends_the_job(name: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MIDWAY.replace("NAME", name))
    settings = (*FAKE, "output.dir=out", "output.commit_every=4", "loader.workers=0")
    done = run(script_ranks(1, tmp_path / "mine.py", *settings), tmp_path)
    assert done.code == 1
    assert line in done.err
    assert "rank 0 of 1" in done.err
    assert json.loads((tmp_path / "out" / "status.json").read_text())["status"] == "failed"
    assert committed_rows(tmp_path / "out") > 0


def test_ranks_must_agree_on_what_they_bring(tmp_path: Path) -> None:
    models, data = tmp_path / "models", tmp_path / "data"
    ends: list[Ended] = []
    for folder, arguments in (
        (models, "model=lambda: nn.Sequential(nn.Conv2d(3, 4 + rank, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())"),
        (data, "model=build, dataset=lambda: [torch.zeros(3, 8, 8)] * (5 + rank)"),
    ):
        folder.mkdir()
        (folder / "mine.py").write_text(
            "import os, torch, mgpu_ddp\nfrom torch import nn\nfrom tests.support.brought.classes import build\n"
            f"rank = int(os.environ['RANK'])\nmgpu_ddp.main({arguments})\n"
        )
        settings = FAKE if folder == models else ()
        ends.append(run(script_ranks(2, folder / "mine.py", *settings, "output.dir=out"), folder))
    assert [end.code for end in ends] == [2, 2]
    assert "model must be the same on all ranks, got 0.weight as float32 (4, 3, 1, 1) on rank 0 and" in ends[0].err
    assert "dataset must be the same on all ranks, got 5 items" in ends[1].err
    assert all(end.err.count("mgpu_ddp: ") == 1 for end in ends)


def test_what_binds_a_job_is_compared(tmp_path: Path) -> None:
    """Another version, another class or another column is another job."""
    text = (
        "import mgpu_ddp\nfrom tests.support.brought.heads import build, outputs\n"
        "mgpu_ddp.main(model=build, ARGUMENTS)\n"
    )
    (tmp_path / "mine.py").write_text(text.replace("ARGUMENTS", "outputs=outputs, version='1'"))
    settings = (*FAKE, "output.dir=out", WORKERS)
    out_of(script_ranks(1, tmp_path / "mine.py", *settings), tmp_path)
    (tmp_path / "mine.py").write_text(text.replace("ARGUMENTS", "outputs=outputs, version='2'"))
    done = run(script_ranks(1, tmp_path / "mine.py", *settings), tmp_path)
    assert (done.code, "model.version='1' there, '2' here" in done.err) == (2, True), done.err
    (tmp_path / "mine.py").write_text(text.replace("ARGUMENTS", "version='1'"))
    done = run(script_ranks(1, tmp_path / "mine.py", *settings), tmp_path)
    assert done.code == 2
    assert "columns=" in done.err


def test_shards_of_a_script_are_merged(tmp_path: Path) -> None:
    whole = read_table(out_of(script("detector", 1, *FAKE), tmp_path / "whole"))
    commands = [
        script_ranks(1, SCRIPTS / "detector.py", *FAKE, WORKERS, f"shard={i}/2", f"output.dir={tmp_path}/all/{i}")
        for i in range(2)
    ]
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    assert [end.code for end in run_all(commands, folders)] == [0, 0]
    from mgpu_ddp.merge import merge

    assert merge(tmp_path / "all")["rows"] == N
    assert read_table(tmp_path / "all").equals(whole)


def test_a_sweep_runs_the_script_at_each_point(tmp_path: Path) -> None:
    words = (*FAKE[:-1], WORKERS, "--multirun", "batch_size=2,4", "hydra.sweep.dir=sweep")
    done = run(script_ranks(2, SCRIPTS / "heads.py", *words), tmp_path)
    assert done.code == 0, done.err
    tables = [read_table(tmp_path / "sweep" / str(i)) for i in range(2)]
    assert [table.column_names[3:-1] for table in tables] == [["kind", "is_sure", "share", "features", "mask"]] * 2


def test_a_plan_and_the_configuration_are_shown(tmp_path: Path) -> None:
    plan = run(script_ranks(1, SCRIPTS / "heads.py", *FAKE, "dry_run=true", "output.dir=out"), tmp_path)
    assert plan.code == 0, plan.err
    assert f"samples        {N} (0 to {N})" in plan.out
    assert not (tmp_path / "out").exists()
    shown = run(script_ranks(1, SCRIPTS / "heads.py", "--cfg", "job"), tmp_path)
    assert "model:\n  name: script" in shown.out


@pytest.mark.parametrize("word", ["model=timm", "model.name=vgg11", "data=folder", "data.size=4", "transform.mean=0.5"])
def test_keys_of_what_the_script_brings_are_refused(word: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch, mgpu_ddp\nfrom torchvision import transforms as t\n"
        "from tests.support.brought.classes import build\n"
        "mgpu_ddp.main(model=build, dataset=lambda: [torch.zeros(3, 8, 8)], transform=lambda: t.ToTensor())\n"
    )
    done = run(script_ranks(1, tmp_path / "mine.py", word), tmp_path)
    key, group = word.partition("=")[0], word.partition("=")[0].partition(".")[0]
    assert done.code == 2
    assert f"mgpu_ddp: {key} must be left out where the script brings its {group}, got {word!r}." in done.err


KEEPS = """
import time, torch, mgpu_ddp
from torch import nn

class Inner(nn.Module):
    def forward(self, images):
        return images.mean(dim=(1, 2, 3))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.weight = Inner(), nn.Parameter(torch.zeros(1))
    def forward(self, images):
        self.kept = self.inner(images)
        # Long enough for a batch beside it to put its own in the place.
        for _ in range(20):
            torch.randn(64, 64) @ torch.randn(64, 64)
            time.sleep(0.002)
        return {"kept": self.kept, "mean": images.mean(dim=(1, 2, 3))}

features = {}

def hooked():
    net = Net()
    net.inner.register_forward_hook(lambda module, inputs, output: features.update(kept=output))
    return net

def outputs(found):
    return {**found, "kept": features["kept"]}

mgpu_ddp.main(ARGUMENTS)
"""


@pytest.mark.parametrize("arguments", ["model=Net", "model=hooked, outputs=outputs"])
def test_a_forward_that_keeps_something_of_a_batch_has_no_other_beside_it(arguments: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(KEEPS.replace("ARGUMENTS", arguments))
    folder = out_of(script_ranks(1, tmp_path / "mine.py", *FAKE, "output.dir=out", WORKERS), tmp_path)
    assert "one batch at a time" in (tmp_path / "stderr.txt").read_text()
    table = read_table(folder)
    assert table["kept"].to_pylist() == table["mean"].to_pylist()
