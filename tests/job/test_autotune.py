"""The values that `auto` finds before a job starts, with real models on this machine."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mgpu_ddp.config.schema import Config, FakeConfig, ModelConfig, RuntimeConfig, TransformConfig
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import UsageError
from mgpu_ddp.job import autotune
from mgpu_ddp.job.autotune import LARGEST, SMALLEST, choose_compile, find_batch_size
from mgpu_ddp.job.job import Job
from mgpu_ddp.models.model import Model
from mgpu_ddp.models.operations import operations
from mgpu_ddp.output.manifest import Manifest, Part
from mgpu_ddp.preprocess.transform import plain
from tests.inference.test_predictor import CLASSES, SIDE, TOO_MUCH
from tests.support.choices import PredictorsOf, setup

ROWS = 1000
TINY = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * SIDE**2, CLASSES))
MODEL = Model(module=TINY, num_classes=CLASSES, identity={}, origin="", class_names=None, preset=None)


class Hungry(nn.Module):
    """A model that costs as much for one image as for a batch, and does not take more than `most`."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.sizes = most, set[int]()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.sizes.add(len(images))
        if len(images) > self.most:
            torch.empty(TOO_MUCH, dtype=torch.uint8)
        torch.ones(600, 600) @ torch.ones(600, 600)
        return images.sum(dim=(1, 2, 3))[:, None] * torch.arange(CLASSES)


def job(run_dir: Path, **changes: Any) -> Job:
    config = Config(
        data=FakeConfig(size=ROWS),
        transform=TransformConfig(),
        model=ModelConfig(weights=None),
        **{"batch_size": "auto", **changes},
    )
    return Job(name="0", config=config, run_dir=run_dir)


def find(module: nn.Module, run_dir: Path, world: World) -> int:
    wanted = job(run_dir)
    predictors = PredictorsOf(module, wanted.config, world)
    return find_batch_size(setup(wanted, MODEL, world, predictors, transform=plain(SIDE)))


def test_it_grows_while_that_pays_and_as_far_as_memory_goes(
    tmp_path: Path, world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mgpu_ddp"), "propagate", True)
    caplog.set_level(logging.INFO, "mgpu_ddp")
    module = Hungry(most=4 * SMALLEST)
    assert find(module, tmp_path, world) == 4 * SMALLEST
    assert max(module.sizes) == 8 * SMALLEST < LARGEST
    assert caplog.messages[-1] == f"batch_size=auto chose {4 * SMALLEST}"


def test_a_folder_keeps_the_batch_size_it_was_started_with(tmp_path: Path, world: World) -> None:
    Manifest(fingerprint={"output.format": "parquet"}, start=0, stop=9, batch_size=48).write(tmp_path)
    module = Hungry(most=8)
    assert find(module, tmp_path, world) == 48
    assert not module.sizes, "nothing was tried"


class Broken(nn.Module):
    """A model that no compiler takes, as far as its caller can tell."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise ValueError("no compiler " * 100)


def choose(job: Job, world: World, tried: nn.Module | None = None) -> tuple[str, list[int]]:
    """The choice for a job of a tiny model, and the batch sizes that were tried with another."""
    tried = tried or Hungry(most=LARGEST)

    predictors = PredictorsOf(tried, job.config, world)
    decided = choose_compile(setup(job, MODEL, world, predictors, transform=plain(SIDE)))
    return decided, sorted(getattr(tried, "sizes", []))


@pytest.fixture
def worth(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if compiling were worth its while from `ROWS` images of the tiny model on."""
    monkeypatch.setattr(autotune, "WORTH_COMPILING", ROWS * operations(TINY, plain(SIDE)))


def test_a_multiplication_and_an_addition_are_two_operations() -> None:
    pixels = SIDE**2
    assert operations(TINY, plain(SIDE)) == 2 * pixels * 4 * 3 * 9 + 2 * 4 * pixels * CLASSES


@pytest.mark.usefixtures("worth")
def test_work_decides_whether_to_compile(tmp_path: Path, world: World) -> None:
    assert choose(job(tmp_path, batch_size=16), world) == ("on", [16])
    assert choose(job(tmp_path, batch_size=16, limit=ROWS - 1), world) == ("off", [])
    assert choose(job(tmp_path, batch_size=2 * ROWS), world) == ("on", [ROWS])


def test_a_short_job_is_not_compiled(tmp_path: Path, world: World) -> None:
    assert choose(job(tmp_path, batch_size=16), world) == ("off", [])


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": "auto"},
        {"shard": "0/2"},
        {"strategy": "data_parallel"},
        {"runtime": RuntimeConfig(compile="off")},
    ],
    ids=["batch size", "shard", "threads", "off"],
)
def test_some_jobs_are_never_compiled(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    # A shard's own work is less than the job's.
    monkeypatch.setattr(autotune, "WORTH_COMPILING", 0)
    assert choose(job(tmp_path, **{"batch_size": 16, **changes}), world) == ("off", [])


@pytest.fixture
def gpu(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    """As if there were a GPU, on which compiling were worth its while from `ROWS` images of a tiny Swin on."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a GPU")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    gain = autotune.MARGIN * autotune.COMPILE_S / (ROWS * operations(TINY, plain(SIDE)))
    monkeypatch.setattr(autotune, "GAINS", {"swin_t$": gain})
    return replace(world, device=torch.device("cuda"))


def on_gpu(job: Job, world: World, name: str = "swin_t", precision: str = "fp16") -> bool:
    job = replace(job, config=replace(job.config, model=ModelConfig(name=name, weights=None)))
    made = setup(job, MODEL, world, PredictorsOf(TINY, job.config, world), transform=plain(SIDE), precision=precision)
    return autotune._plan_compile(made).compiled


def test_work_and_family_decide_on_a_gpu(tmp_path: Path, gpu: World) -> None:
    wanted = job(tmp_path, batch_size=16)
    assert on_gpu(wanted, gpu)
    assert not on_gpu(job(tmp_path, batch_size=16, limit=ROWS - 1), gpu)
    assert not on_gpu(wanted, replace(gpu, size=2)), "each rank has half the work, and compiles as long"
    assert not on_gpu(wanted, gpu, name="swin_tv")
    assert not on_gpu(wanted, gpu, precision="fp32")


def test_what_was_compiled_before_is_worth_it_sooner(tmp_path: Path, gpu: World, world: World) -> None:
    few = job(tmp_path, batch_size=16, limit=ROWS // 2)
    assert not on_gpu(few, gpu)
    made = setup(few, MODEL, gpu, PredictorsOf(TINY, few.config, gpu), transform=plain(SIDE), precision="fp16")
    autotune.note_compiled(autotune._compiled_for(made, 16))
    assert on_gpu(few, gpu)
    assert not on_gpu(job(tmp_path, batch_size=32, limit=ROWS // 2), gpu), "other shapes are other code"
    assert not on_gpu(job(tmp_path, batch_size=16, limit=ROWS // 4), gpu), "loading it takes a while as well"
    compiled = replace(few, config=replace(few.config, runtime=RuntimeConfig(compile="on")))
    mine = setup(compiled, MODEL, world, PredictorsOf(TINY, few.config, world), transform=plain(SIDE))
    assert not autotune.was_compiled(autotune._compiled_for(mine, ROWS // 2))
    choose(replace(compiled, config=replace(compiled.config, batch_size=ROWS // 2)), world)
    assert autotune.was_compiled(autotune._compiled_for(mine, ROWS // 2))


@pytest.mark.parametrize(
    ("name", "gains"),
    [
        ("swin_t", True),
        ("swin_base_patch4_window7_224", True),
        ("swin_v2_t", False),
        ("convnext_base", True),
        ("convnext_tiny.fb_in1k", True),
        ("convnextv2_tiny", False),
        ("efficientnet_v2_s", True),
        ("tf_efficientnetv2_s", True),
        ("efficientnet_b0", False),
        ("resnet18", False),
    ],
)
def test_families_that_were_measured_are_known_by_name(name: str, gains: bool, tmp_path: Path) -> None:
    config = job(tmp_path).config
    assert (autotune._gain(replace(config, model=ModelConfig(name=name))) > 0) == gains


@pytest.mark.usefixtures("worth")
@pytest.mark.parametrize("was", ["on", "off"])
def test_a_folder_keeps_how_it_was_started(tmp_path: Path, world: World, was: str) -> None:
    manifest = Manifest(
        fingerprint={"output.format": "parquet", "runtime.compile": was}, start=0, stop=9, batch_size=48
    )
    manifest.write(tmp_path)
    again = replace(job(tmp_path, batch_size=16, limit=9), batch_size_given=False)
    assert choose(again, world) == (was, [48] if was == "on" else [])
    assert choose(replace(again, batch_size_given=True), world) == (was, [9] if was == "on" else [])
    assert choose(replace(again, config=replace(again.config, overwrite=True)), world) == ("off", [])
    name = "predictions/part-000000000000-ab12cd.parquet"
    part = Part(file=name, first=0, rows=9, errors=0, num_bytes=1, sha256="0" * 64)
    replace(manifest, parts=[part], complete=True).write(tmp_path)
    assert choose(again, world) == (was, []), "nothing is left to do"
    grown = replace(again, config=replace(again.config, limit=10))
    assert choose(grown, world) == (was, [48] if was == "on" else [])
    retried = replace(again, config=replace(again.config, retry_failed=True))
    assert choose(retried, world) == (was, [48] if was == "on" else [])


def test_a_folder_begun_otherwise_is_refused_before_anything_is_compiled(tmp_path: Path, world: World) -> None:
    Manifest(
        fingerprint={"output.format": "parquet", "runtime.compile": "off"}, start=0, stop=ROWS, batch_size=16
    ).write(tmp_path)
    assert choose(job(tmp_path, batch_size=16, runtime=RuntimeConfig(compile="on")), world) == ("on", [])


@pytest.mark.usefixtures("worth")
def test_what_cannot_be_compiled_is_not_or_is_told(
    tmp_path: Path, world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mgpu_ddp"), "propagate", True)
    assert choose(job(tmp_path, batch_size=16), world, Broken()) == ("off", [])
    assert caplog.messages[-1].startswith(
        "runtime.compile=auto is off, because the model cannot be compiled: rank 0 of 1: ValueError: no compiler"
    )
    assert len(caplog.messages[-1]) < 500
    with pytest.raises(
        UsageError, match=r"runtime.compile must be off where .*, got 'on' \(rank 0 of 1: ValueError: no"
    ):
        choose(job(tmp_path, batch_size=16, runtime=RuntimeConfig(compile="on")), world, Broken())
    Manifest(
        fingerprint={"output.format": "parquet", "runtime.compile": "on"}, start=0, stop=ROWS, batch_size=16
    ).write(tmp_path)
    with pytest.raises(UsageError, match=r"runtime.compile must be off"):
        choose(job(tmp_path, batch_size=16), world, Broken())


def test_a_lack_of_memory_is_not_the_compilers(tmp_path: Path, world: World) -> None:
    runtime = RuntimeConfig(compile="on", on_oom="raise")
    assert choose(job(tmp_path, batch_size=16, runtime=runtime), world, Hungry(most=8)) == ("on", [16])
