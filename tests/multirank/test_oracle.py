"""The oracle: the output of W ranks equals the output of one rank, row by row, bit by bit."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torchvision import transforms

from mgpu_ddp.config.schema import ArrayConfig
from mgpu_ddp.distributed.world import World
from mgpu_ddp.job import autotune
from mgpu_ddp.models.lazy_dynamo import UTILS, StandIn
from tests.support.runs import assert_proved, make_images, read_rows, read_table
from tests.support.worlds import Case, ended, folder, run_world, tiny

SIZES = (1, 2, 3)
COUNTS = (0, 1, 2, 3, 4, 5, 97)
"""Samples: none, fewer than ranks, W-1, W and W+1 for each W, and a ragged many."""


def grid(images: Path) -> list[Case]:
    """Sizes of data and windows, ways to collect and formats, pairwise rather than all combinations."""
    cases = [
        Case(name=f"n{n}-{collect}", config=tiny(data={"size": n}, output={"collect": collect, "commit_every": 8}))
        for n in COUNTS
        for collect in ("gather", "shards")
    ]
    everything = ["topk", "logits", "probs", "embedding"]
    outputs: list[dict[str, Any]] = [
        {"format": "parquet", "collect": "gather", "commit_every": 1, "fields": everything},
        {"format": "parquet", "collect": "shards", "commit_every": "auto", "fields": everything},
        {"format": "csv", "collect": "gather", "commit_every": 1000, "topk": 3},
        {"format": "csv", "collect": "shards", "commit_every": 97, "fields": ["topk", "logits"]},
        {"format": "jsonl", "collect": "gather", "commit_every": "auto", "fields": ["probs"]},
        {"format": "jsonl", "collect": "shards", "commit_every": 40, "topk": 50},
        {"format": "npy", "collect": "gather", "commit_every": 40},
        {"format": "npy", "collect": "shards", "commit_every": "auto"},
        {"format": "npy", "collect": "auto", "commit_every": 1},
    ]
    cases += [
        Case(
            name="-".join(["out", *(str(output[k]) for k in ("format", "collect", "commit_every"))]),
            config=tiny(output=output),
        )
        for output in outputs
    ]
    cases.append(Case(name="empty-npy", config=tiny(data={"size": 0}, output={"format": "npy"})))
    cases.append(Case(name="images", config=tiny(data=folder(images))))
    cases.append(
        Case(name="images-shards", config=tiny(data=folder(images), output={"collect": "shards", "commit_every": 16}))
    )
    arrays = {"commit_every": 24}
    cases += [
        Case(name=f"array-{collect}", config=tiny(data=array(images), output={"collect": collect, **arrays}))
        for collect in ("gather", "shards")
    ]
    cases.append(Case(name="half", config=tiny(shard="1/2", limit=90, loader={"workers": 0})))
    return cases


def compile_always(_world: World) -> None:
    """From here on, any work is worth compiling."""
    autotune.WORTH_COMPILING = 0


def heavy_imports(_world: World) -> list[str]:
    """Find pandas, and what only compiling needs, among what this process has imported for its jobs."""
    return [name for name in ("pandas", "torch._dynamo", "torch._inductor", "sympy") if name in sys.modules]


def detect(_world: World) -> bool:
    """Have torchvision compile a detector's roi_align, as it does on GPUs with deterministic algorithms."""
    images, boxes = torch.rand(1, 3, 16, 16), [torch.tensor([[0.0, 0.0, 8.0, 8.0]])]
    expected = torchvision.ops.roi_align(images, boxes, 2)
    torchvision.ops.roi_align.__globals__["_has_ops"] = lambda: False
    return torch.allclose(torchvision.ops.roi_align(images, boxes, 2), expected)


def want_more(_world: World) -> bool:
    """Import from the stand-in what it does not have, as another release of torchvision may."""
    sys.modules[UTILS] = StandIn(UTILS)
    counters = importlib.import_module(UTILS).counters
    return counters is importlib.import_module(UTILS).counters is sys.modules["torch._dynamo"].utils.counters


LIGHT = Case(name="light", call=heavy_imports)
MORE = Case(name="more", call=want_more)

COMPILED = [
    Case(name="always", call=compile_always),
    Case(name="compiled", config=tiny(output={"commit_every": 24, "fields": ["topk", "logits", "embedding"]})),
]
"""They take half a minute: a slow test has worlds of its own for them."""
DETECT = Case(name="detect", call=detect)


def array(images: Path) -> ArrayConfig:
    """An array beside a folder of images."""
    return ArrayConfig(path=f"{images}.npy")


@pytest.fixture(scope="module")
def broken_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 images, of which two are broken."""
    root = tmp_path_factory.mktemp("broken")
    paths = make_images(root, 37)
    paths[5].write_bytes(b"not an image")
    paths[20].write_bytes(paths[20].read_bytes()[:200])
    np.save(array(root).path, np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8))
    return root


class Worlds(dict[int, Path]):
    """The output folder of a world by its size, each having run the whole grid when it is first asked for."""

    def __init__(self, out: Path, images: Path) -> None:
        self._out, self._images = out, images

    def __missing__(self, size: int) -> Path:
        self[size] = self._out / str(size)
        run_world(size, [*grid(self._images), LIGHT], self[size])
        return self[size]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory, broken_images: Path) -> Worlds:
    return Worlds(tmp_path_factory.mktemp("worlds"), broken_images)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("size", [*SIZES[1:], pytest.param(4, marks=pytest.mark.slow)])
def test_worlds_equal_one_rank(worlds: Worlds, broken_images: Path, size: int) -> None:
    for case in grid(broken_images):
        one, many = worlds[1] / case.name, worlds[size] / case.name
        assert ended(worlds[size], case.name, size)[0]["status"] == "complete", case.name
        if (one / "predictions.npy").exists():
            first, second = (np.load(run / "predictions.npy", mmap_mode="r") for run in (one, many))
            assert first.dtype == second.dtype == np.float32
            assert np.array_equal(first, second, equal_nan=True), case.name
        else:
            assert read_rows(one) == read_rows(many), case.name


@pytest.mark.slow
def test_compiled_worlds_equal_one_compiled_rank(worlds: Worlds, tmp_path: Path) -> None:
    run_world(1, [MORE, *COMPILED, DETECT], tmp_path / "1")
    run_world(2, COMPILED, tmp_path / "2")
    one, two = (tmp_path / str(size) / "compiled" for size in (1, 2))
    assert_proved(one, 97)
    assert json.loads((one / "manifest.json").read_text())["fingerprint"]["runtime.compile"] == "on"
    assert read_rows(one) == read_rows(two)
    eager = read_table(worlds[1] / "out-parquet-gather-1")["logits"].to_numpy()
    assert np.allclose(np.stack(read_table(one)["logits"].to_numpy()), np.stack(eager), atol=1e-5)
    # The compiler that torchvision was imported without comes when it is called for.
    assert ended(tmp_path / "1", "more", 1) == ended(tmp_path / "1", "detect", 1) == [True]


def test_jobs_that_do_not_compile_import_neither_a_compiler_nor_pandas(worlds: Worlds) -> None:
    for size in SIZES:
        assert ended(worlds[size], "light", size) == [[]] * size


def test_every_run_proves_itself(worlds: Worlds) -> None:
    for size in SIZES:
        for n in COUNTS:
            for collect in ("gather", "shards"):
                assert_proved(worlds[size] / f"n{n}-{collect}", n)
        assert_proved(worlds[size] / "images", 37, errors=2)
        assert_proved(worlds[size] / "array-gather", 50)
        assert np.load(worlds[size] / "empty-npy" / "predictions.npy").shape == (0, 12)
        index = [row["index"] for row in read_rows(worlds[size] / "half")]
        assert index == list(range(45, 90))


def test_bad_images_cost_one_row_each(worlds: Worlds) -> None:
    rows = read_rows(worlds[3] / "images")
    bad = [row for row in rows if row["error"]]
    assert len(bad) == 2
    assert all(row["pred"] is None and row["topk_index"] is None and row["path"] for row in bad)
    listed = [json.loads(line) for line in (worlds[3] / "images" / "errors.jsonl").read_text().splitlines()]
    assert [(e["index"], e["path"], e["reason"]) for e in listed] == [(b["index"], b["path"], b["error"]) for b in bad]
    assert "not an image" in " ".join(row["error"] for row in bad)


def test_one_rank_equals_a_plain_loop_over_fake_data(worlds: Worlds) -> None:
    """The tutorial's loop: FakeData, Resize, ToTensor, model, np.concatenate."""
    torch.manual_seed(0)
    model = torchvision.models.squeezenet1_1(num_classes=12).eval()
    transform = transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor()])
    data = torchvision.datasets.FakeData(97, (3, 32, 32), 10, transform)
    logits = _plain_logits(model, [data[i][0] for i in range(97)])
    assert np.allclose(np.load(worlds[1] / "out-npy-gather-40" / "predictions.npy"), logits, atol=1e-5)
    table = read_table(worlds[1] / "out-parquet-gather-1")
    assert np.allclose(np.stack(table["logits"].to_numpy()), logits, atol=1e-5)
    assert np.allclose(np.stack(table["probs"].to_numpy()), _softmax(logits), atol=1e-5)
    assert table["label"].to_pylist() == [int(data[i][1]) for i in range(97)]
    _assert_top_k(table, logits, 5)


def test_one_rank_equals_a_plain_loop_over_images(worlds: Worlds, broken_images: Path) -> None:
    torch.manual_seed(0)
    model = torchvision.models.squeezenet1_1(num_classes=12).eval()
    transform = transforms.Compose(
        [
            transforms.Resize(round(32 * 256 / 224)),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    table = read_table(worlds[1] / "images")
    good = table.filter(table["error"].is_null())
    paths = [broken_images / path for path in good["path"].to_pylist()]
    logits = _plain_logits(model, [transform(ImageOps.exif_transpose(Image.open(p)).convert("RGB")) for p in paths])
    _assert_top_k(good, logits, 5)
    assert good["label"].to_pylist() == [int(path.parent.name.removeprefix("class")) for path in paths]


def _plain_logits(model: nn.Module, images: list[torch.Tensor]) -> Any:
    with torch.no_grad():
        return np.concatenate([model(torch.stack(images[i : i + 4])).numpy() for i in range(0, len(images), 4)])


def _softmax(logits: Any) -> Any:
    return torch.from_numpy(logits).softmax(1).numpy()


def _assert_top_k(table: Any, logits: Any, k: int) -> None:
    probs = _softmax(logits)
    best = np.argsort(-probs, axis=1)[:, :k]
    assert table["topk_index"].to_pylist() == best.tolist()
    assert table["pred"].to_pylist() == best[:, 0].tolist()
    assert np.allclose(np.stack(table["topk_prob"].to_numpy()), np.take_along_axis(probs, best, 1), atol=1e-5)
    assert np.allclose(table["prob"].to_numpy(), probs.max(1), atol=1e-5)
