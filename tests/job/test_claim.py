"""A job's place in the run folder, before anything is predicted."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from mgpu_ddp.config.schema import (
    ArrayConfig,
    Config,
    FakeConfig,
    FolderConfig,
    ListConfig,
    LoaderConfig,
    ModelConfig,
    ParquetConfig,
    TransformConfig,
    WebDatasetConfig,
    dataset_range,
)
from mgpu_ddp.data.datasets import find_listing
from mgpu_ddp.data.listing import Listing
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import UsageError
from mgpu_ddp.inference.pipeline import STAGED, in_flight
from mgpu_ddp.job.claim import claim_job, known_listing, place_job
from mgpu_ddp.job.context import Claim
from mgpu_ddp.job.job import Job
from mgpu_ddp.job.plan import Planner
from mgpu_ddp.job.tasks import error_limit
from mgpu_ddp.models.build import build_model
from mgpu_ddp.output.run_folder import RunFolder
from tests.support.choices import resolved, setup
from tests.support.runs import make_images
from tests.support.sources import write_parquet, write_tar
from tests.support.worlds import run_job


def config(**changes: Any) -> Config:
    model = ModelConfig(name="squeezenet1_1", weights=None, num_classes=5)
    return Config(**{"data": FakeConfig(), "transform": TransformConfig(), "model": model} | changes)


def claimed(settings: Config, run_dir: Path, world: World) -> tuple[RunFolder, Claim]:
    """Claim a run folder as a job does, and let go of it."""
    job = Job(name="0", config=settings, run_dir=run_dir)
    folder = place_job(job, world)
    files = find_listing(settings, known_listing(settings, folder, world), world)
    made = setup(job, build_model(settings), world, batch_size=int(settings.batch_size))
    with folder:
        return folder, claim_job(replace(made, folder=folder, files=files))


def listed(claim: Claim) -> list[str | None]:
    return [claim.samples.path(i) for i in range(len(claim.samples))]


@pytest.mark.parametrize("name", ["other", "first"])
def test_overwrite_lists_the_images_anew(tmp_path: Path, world: World, name: str) -> None:
    for file in ("first/a.png", "first/b.png", "other/c.png"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    claimed(config(data=FolderConfig(root=str(tmp_path / "first"))), tmp_path / "run", world)
    (tmp_path / "first/a.png").rename(tmp_path / "first/z.png")
    again = config(data=FolderConfig(root=str(tmp_path / name)), overwrite=True)
    folder, claim = claimed(again, tmp_path / "run", world)
    expected = sorted(path.name for path in (tmp_path / name).iterdir())
    assert listed(claim) == expected
    assert folder.path == tmp_path / "run/.next"
    assert (claim.start, claim.stop) == (0, len(expected))


def test_overwrite_holds_until_an_attempt_of_the_launch_has_claimed(tmp_path: Path, world: World) -> None:
    claimed(config(), tmp_path / "run", world)
    job = Job(name="0", config=config(overwrite=True), run_dir=tmp_path / "run")
    assert place_job(job, world).starts_over
    # That attempt died while it loaded the model.
    assert place_job(job, world).starts_over
    claimed(job.config, job.run_dir, world)
    again = place_job(job, world)
    assert (again.path, again.starts_over) == (tmp_path / "run/.next", False)


def test_a_resumed_job_keeps_its_images_and_appends_new_ones(tmp_path: Path, world: World) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/b.png").touch()
    settings = config(data=FolderConfig(root=str(tmp_path / "images")))
    claimed(settings, tmp_path / "run", world)
    (tmp_path / "images/a.png").touch()
    _, claim = claimed(settings, tmp_path / "run", world)
    assert (listed(claim), claim.stop) == (["b.png", "a.png"], 2)
    (tmp_path / "images/b.png").unlink()
    _, claim = claimed(settings, tmp_path / "run", world)
    assert (listed(claim), claim.stop) == (["b.png", "a.png"], 2), "what vanished keeps its index"


def test_a_folder_that_was_begun_without_sizes_and_times_continues(tmp_path: Path, world: World) -> None:
    images = make_images(tmp_path / "images", 3)
    settings = config(data=FolderConfig(root=str(tmp_path / "images")))
    claimed(settings, tmp_path / "run", world)
    # As an earlier version left it.
    listing, manifest = tmp_path / "run/listing.arrow", tmp_path / "run/manifest.json"
    known = Listing.open(listing)
    listing.write_bytes(Listing.build([known.path(i) for i in range(3)]).buffer)
    newer = ("left_out", "changed", "checksum")
    values = {key: value for key, value in json.loads(manifest.read_text()).items() if key not in newer}
    assert not {"data.check", "data.extensions"} & values["fingerprint"].keys()
    manifest.write_text(json.dumps(values))
    os.utime(images[1])
    _, claim = claimed(settings, tmp_path / "run", world)
    assert len(claim.changed) == 0, "nothing is known of what it was"
    again = Listing.open(listing)
    assert again.table["bytes"].to_pylist() == [
        (tmp_path / "images" / os.fsdecode(again.path(i))).stat().st_size for i in range(3)
    ]
    os.utime(images[1])
    files = find_listing(settings, again, world)
    assert files is not None
    assert [again.path(i) for i in files.changed] == [os.fsencode(images[1].relative_to(tmp_path / "images"))]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "resnet19"}, "model.name must be a torchvision classification model"),
        ({"weights": "gone.pt"}, "model.weights must be a readable file"),
    ],
)
def test_a_model_that_is_not_there_is_told_before_the_images_are_listed(
    tmp_path: Path, world: World, settings: dict[str, Any], said: str
) -> None:
    """Many tars take minutes."""
    data = WebDatasetConfig(urls=str(tmp_path / "gone.tar"))
    with pytest.raises(UsageError, match=said):
        run_job(config(data=data, model=ModelConfig(**settings)), tmp_path / "run", world)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("source", "key", "value"),
    [
        ("webdataset", "label_extension", "cls"),
        ("webdataset", "extensions", ["jpg"]),
        ("parquet", "column", "other"),
        ("parquet", "label_column", "label"),
        ("parquet", "key_column", "image.path"),
    ],
)
def test_a_folder_that_was_begun_with_another_key_is_refused_for_that_key(
    tmp_path: Path, world: World, source: str, key: str, value: Any, first: bool
) -> None:
    """Its listing says what the first start's keys have found."""
    photos = make_images(tmp_path / "photos", 4)
    write_tar(tmp_path / "x.tar", photos, [1] * 4)
    write_parquet(tmp_path / "x.parquet", photos, [1] * 4, group=4)
    table = pq.read_table(tmp_path / "x.parquet")
    pq.write_table(table.append_column("other", table["image"]), tmp_path / "x.parquet")
    data: dict[str, Any] = {
        "webdataset": WebDatasetConfig(urls=f"{tmp_path}/*.tar"),
        "parquet": ParquetConfig(urls=f"{tmp_path}/*.parquet"),
    }
    with_it, without = config(data=replace(data[source], **{key: value})), config(data=data[source])
    claimed(with_it if first else without, tmp_path / "run", world)
    with pytest.raises(UsageError) as refused:
        claimed(without if first else with_it, tmp_path / "run", world)
    assert str(refused.value).startswith("output.dir must hold this same job, got ")
    there, here = (getattr(asked.data, key) for asked in ((with_it, without) if first else (without, with_it)))
    assert f" with data.{key}={there!r} there, {here!r} here. " in str(refused.value)


@pytest.mark.parametrize("length", [0, 1, 7, 100])
@pytest.mark.parametrize("limit", [None, 0, 5, 1000])
def test_shards_cut_the_limited_dataset_without_gap_or_overlap(length: int, limit: int | None) -> None:
    total = length if limit is None else min(length, limit)
    for n in (1, 2, 3, 16):
        ranges = [dataset_range(config(limit=limit, shard=f"{i}/{n}"), length) for i in range(n)]
        assert [i for start, stop in ranges for i in range(start, stop)] == list(range(total))


@pytest.mark.parametrize(("limit", "count"), [(None, float("inf")), (0, 0), (3, 3), (0.5, 100), (1, 1), (0.0, 0)])
def test_max_errors_is_a_count_or_a_share(limit: float | None, count: float) -> None:
    assert error_limit(config(max_errors=limit), 200) == count


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_window_holds_all_that_is_read_ahead_of_it(world: World, device: str) -> None:
    """Else the sampler asks for a window before the one that sizes it was gathered."""
    there = replace(world, device=torch.device(device))
    settings = config(loader=LoaderConfig(prefetch=2))
    choices = resolved(workers=3, decode="gpu" if device == "cuda" else "cpu")
    plan = Planner(config=settings, resolved=choices, types=(), world=there).plan(0, 10**6)
    assert plan.smallest >= plan.step * (3 * 2 + in_flight(there) + (STAGED if device == "cuda" else 0))


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("key", "of", "value"),
    [
        ("model.class_names", ModelConfig, "out/classes.json"),
        ("model.weights", ModelConfig, "link.pt"),
        ("data.urls", ParquetConfig, "out/predictions/*.parquet"),
        ("data.urls", ParquetConfig, "elsewhere/../out/.next/predictions/*.parquet"),
        ("data.path", ArrayConfig, "out/predictions.npy"),
        ("data.path", ListConfig, "out/errors.jsonl"),
        ("data.root", FolderConfig, "out/predictions"),
    ],
)
def test_an_input_that_the_job_would_write_over_is_refused(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch, key: str, of: type[Any], value: str, dry_run: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/classes.json").write_text("precious")
    (tmp_path / "link.pt").symlink_to("out/listing.arrow")
    group, _, name = key.partition(".")
    job = Job(name="0", config=config(**{group: of(**{name: value})}, dry_run=dry_run), run_dir=tmp_path / "out")
    with pytest.raises(UsageError, match=rf"{key} must be outside of the files that a job writes into .* Copy it"):
        place_job(job, world)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["classes.json"]


def test_inputs_may_lie_beside_the_results(tmp_path: Path, world: World) -> None:
    make_images(tmp_path, 3)
    (tmp_path / "names.json").write_text("[]")
    settings = config(data=FolderConfig(root=str(tmp_path)))
    _, claim = claimed(settings, tmp_path, world)
    assert len(listed(claim)) == 3
