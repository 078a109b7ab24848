"""How jobs end: together on all ranks, with what was committed kept, and the next job unharmed."""

import copy
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mgpu_ddp.config.script import Script
from mgpu_ddp.distributed.signals import StopWish
from mgpu_ddp.distributed.world import World, share_weights
from mgpu_ddp.errors import PeerFailedError, UsageError
from mgpu_ddp.job import autotune
from mgpu_ddp.job.autotune import choose_compile
from mgpu_ddp.job.cache import Kept
from mgpu_ddp.job.job import Job
from mgpu_ddp.job.session import Session
from mgpu_ddp.models.model import Model
from mgpu_ddp.preprocess.transform import plain
from tests.support.choices import PredictorsOf, setup
from tests.support.runs import assert_proved, make_images, read_rows
from tests.support.worlds import Case, ended, folder, run_world, tiny

SIZE = 3
MANY = 600


def weights_shared(world: World) -> dict[str, Any]:
    """Share weights and statistics of every kind, which differ between the ranks, our way and by DDP."""
    torch.manual_seed(world.rank)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(6, 5).to(torch.float16))
    module[0].weight.data = torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last)
    module[2].weight.data = torch.randn(6, 5).to(torch.float16).T
    module[1].num_batches_tracked += world.rank
    for name, buffer in {
        "mask": torch.rand(3) > 0.5,
        "none": torch.empty(0),
        "index": torch.randint(9, (2, 2)),
    }.items():
        module.register_buffer(name, buffer, persistent=name != "index")
    ours = copy.deepcopy(module)
    share_weights(ours.requires_grad_(False), world)
    of_ddp = DistributedDataParallel(module).module
    pairs = zip([*ours.parameters(), *ours.buffers()], [*of_ddp.parameters(), *of_ddp.buffers()], strict=True)
    return {
        "as DDP": [torch.equal(mine, its) for mine, its in pairs],
        "weights": [value.double().flatten().tolist() for value in [*ours.parameters(), *ours.buffers()]],
    }


def other_weights_on_rank_1(world: World) -> str:
    """Share a module that is wider on one rank."""
    return refused(nn.Linear(3, 4 + (world.rank == 1)), world)


def other_layers_on_rank_1(world: World) -> str:
    """Share a module whose weights are alike on all ranks, but not what it computes."""
    return refused(nn.Sequential(nn.Linear(3, 4), [nn.ReLU, nn.GELU][world.rank == 1]()), world)


def refused(module: nn.Module, world: World) -> str:
    try:
        share_weights(module.requires_grad_(False), world)
    except UsageError as error:
        return str(error)
    return "nothing"


def fails_on_rank_1(world: World) -> str:
    """A block that fails on one rank raises on all, and names it."""
    try:
        with world.together("a block"):
            if world.rank == 1:
                raise ValueError("only here")
    except ValueError:
        return "my own"
    except PeerFailedError as error:
        return str(error)
    return "nothing"


def at_different_topics(world: World) -> str:
    """Ranks that disagree about where they are find out instead of mixing their values."""
    try:
        world.exchange("left" if world.rank else "right", None)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def sweep_with_a_failing_rank(world: World) -> list[str]:
    """Three jobs of a sweep of which the second fails on rank 1 alone, where nothing collective would tell."""

    def act(job: Job) -> dict[str, Any]:
        if job.name == "1" and world.rank == 1:
            raise ValueError("only here")
        return {"status": "complete", "exit_code": 0, "ran": job.name}

    session = Session(world, StopWish(), Kept(), Script(), act)
    if world.rank == 0:
        for name in "012":
            session.lead(lambda name=name: Job(name=name, config=tiny(), run_dir=Path(), in_sweep=True))
        session.end(None)
    else:
        session.follow()
    return [outcome.get("ran") or outcome["reason"] for outcome in session.outcomes]


def fails_to_compile_on_rank_1(world: World) -> list[str]:
    """Choose `runtime.compile` by auto and by on where one rank cannot predict with the compiled model."""
    autotune.WORTH_COMPILING = 0
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 12))
    model = Model(module=module, num_classes=12, identity={}, origin="", class_names=None, preset=None)

    # One that takes no images of this size stands for one that does not compile.
    mine = nn.Sequential(nn.Flatten(), nn.Linear(5, 12)) if world.rank == 1 else module

    def choose(compile_: str) -> str:
        job = Job(name="0", config=tiny(runtime={"compile": compile_}), run_dir=Path("nowhere"))
        try:
            predictors = PredictorsOf(mine, job.config, world)
            return choose_compile(setup(job, model, world, predictors, transform=plain(4)))
        except UsageError as error:
            return str(error)

    return [choose("auto"), choose("on")]


def repair(path: Path, world: World) -> None:
    """Replace a broken image by a good one."""
    if world.rank == 0:
        make_images(path.parent / "good", 1)[0].replace(path)
        (path.parent / "good").rename(path.parent.parent.parent / "rest")
    world.exchange("repaired", None)


def grow(root: Path, world: World) -> None:
    """Add images that sort before, between and after those that are there, and take one away."""
    if world.rank == 0:
        for number, path in enumerate(make_images(root / "new", 3, seed=9)):
            path.replace(root / f"class{number}" / f"image {'0009x' if number else '0000'} {number}.png")
        (root / "class0" / "image 0000.jpg").unlink()
    world.exchange("grown", None)


def remember(folder: Path, copy: Path, world: World) -> None:
    """Keep a copy of a folder as it is between two jobs."""
    if world.rank == 0:
        shutil.copytree(folder, copy)
    world.exchange("remembered", None)


def retries(root: Path, bad: Path) -> list[Case]:
    """Jobs with an error row each, whose image is repaired; then they retry."""
    broken = sorted(bad.rglob("*.*"))[-1]
    outputs: dict[str, dict[str, Any]] = {
        "parquet": {},
        "csv": {"format": "csv", "fields": ["topk", "logits"]},
        "jsonl": {"format": "jsonl", "collect": "shards"},
        "npy": {"format": "npy"},
    }
    configs = {
        name: {"data": folder(bad), "output": {"commit_every": 12, **output}} for name, output in outputs.items()
    }
    return [
        *(Case(name=f"failed-{name}", config=tiny(**config)) for name, config in configs.items()),
        Case(name="repair", call=partial(repair, broken)),
        *(
            Case(name=f"retried-{name}", config=tiny(**config, retry_failed=True), run_dir=str(root / f"failed-{name}"))
            for name, config in configs.items()
        ),
        *(Case(name=f"good-{name}", config=tiny(**config)) for name, config in configs.items()),
    ]


def jobs(root: Path, bad: Path) -> list[Case]:
    steps = {"commit_every": 48}
    stopping: dict[str, Any] = {"data": {"size": MANY}, "output": steps}
    stopped = tiny(**stopping)
    limited = tiny(data=folder(bad), max_errors=0, output={"commit_every": 12})
    growing = root.parent / "growing images"
    stopped_shards = tiny(data={"size": MANY}, output={**steps, "collect": "shards", "format": "jsonl"})
    resumed = {"data": {"size": MANY}, "output": {"collect": "shards", "format": "jsonl"}}
    return [
        Case(name="weights", call=weights_shared),
        Case(name="other-weights", call=other_weights_on_rank_1),
        Case(name="other-layers", call=other_layers_on_rank_1),
        Case(name="block", call=fails_on_rank_1),
        Case(name="topics", call=at_different_topics),
        Case(name="sweep", call=sweep_with_a_failing_rank),
        Case(name="raise", config=tiny(data=folder(bad), on_error="raise", output={"commit_every": 12})),
        Case(name="after", config=tiny()),
        Case(name="other-batch", config=tiny(batch_size=7)),
        Case(name="recorded", config=tiny(data=folder(bad))),
        Case(name="limited", config=limited),
        Case(name="limited-again", config=limited, run_dir=str(root / "limited")),
        Case(name="raised-limit", config=tiny(data=folder(bad), max_errors=0.5), run_dir=str(root / "limited")),
        Case(name="stopped", config=stopped, stop_at=(1, 100)),
        Case(name="continued", config=tiny(data={"size": MANY}), run_dir=str(root / "stopped")),
        Case(name="stopped-shards", config=stopped_shards, stop_at=(0, 100)),
        Case(name="continued-shards", config=tiny(**resumed), run_dir=str(root / "stopped-shards")),
        Case(name="again", config=tiny(data={"size": MANY}), run_dir=str(root / "stopped")),
        Case(name="another", config=tiny(data={"size": MANY}, seed=1), run_dir=str(root / "stopped")),
        Case(name="whole", config=tiny(data={"size": MANY})),
        Case(name="whole-shards", config=tiny(data={"size": MANY}, output={"collect": "shards", "format": "jsonl"})),
        Case(name="unwritable", config=tiny(), run_dir="/proc/nowhere"),
        Case(name="missing-root", config=tiny(data=folder(root / "nothing"))),
        Case(name="two-processes", config=tiny(strategy="data_parallel")),
        Case(name="dry", config=tiny(dry_run=True)),
        Case(name="old", config=tiny()),
        Case(name="replacing", config=tiny(**stopping, overwrite=True), run_dir=str(root / "old"), stop_at=(2, 100)),
        Case(name="halfway", call=partial(remember, root / "old", root / "old halfway")),
        Case(name="meanwhile", config=tiny(), run_dir=str(root / "old")),
        Case(name="replaced", config=tiny(data={"size": MANY}), run_dir=str(root / "old")),
        Case(name="growing", config=tiny(data=folder(growing))),
        Case(name="grow", call=partial(grow, growing)),
        Case(name="grown", config=tiny(data=folder(growing)), run_dir=str(root / "growing")),
        *retries(root, bad),
        Case(name="last", config=tiny()),
        Case(name="one-cannot", call=fails_to_compile_on_rank_1),
        # Now any work is worth compiling, but what was begun stays as it was.
        Case(name="begun-before", config=tiny(), run_dir=str(root / "last")),
    ]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("endings")
    paths = make_images(root / "bad", 37)
    paths[35].write_bytes(b"broken")
    make_images(root / "growing images", 20)
    run_world(SIZE, jobs(root / "out", root / "bad"), root / "out")
    return root / "out"


@pytest.fixture(scope="module")
def end_of(out: Path) -> Callable[[str], list[Any]]:
    return lambda case: ended(out, case, SIZE)


Ends = Callable[[str], list[Any]]


def test_weights_and_statistics_come_from_rank_0(end_of: Ends) -> None:
    first, *others = end_of("weights")
    assert first["as DDP"] == [True] * 12
    assert all(other == first for other in others)


def test_a_model_that_differs_between_ranks_is_refused_on_all(end_of: Ends) -> None:
    for text in end_of("other-weights"):
        assert "got weight as float32 (4, 3) on rank 0 and float32 (5, 3) on rank 1" in text
    assert all("got 1 as ReLU on rank 0 and GELU on rank 1" in text for text in end_of("other-layers"))


def test_a_block_fails_on_all_or_none(end_of: Ends) -> None:
    assert end_of("block") == [
        "rank 1 of 3 raised ValueError: only here",
        "my own",
        "rank 1 of 3 raised ValueError: only here",
    ]


def test_ranks_at_different_topics_find_out(end_of: Ends) -> None:
    assert all("but the ranks are at ['left', 'right']" in text for text in end_of("topics"))


def test_a_bad_sample_ends_the_job_where_asked(out: Path, end_of: Ends) -> None:
    raised = end_of("raise")
    owner = [end for end in raised if end["raised"] == "SampleError"]
    assert len(owner) == 1
    assert "image 0035.png" in owner[0]["text"]
    assert all(
        end["raised"] == "PeerFailedError" and "image 0035.png" in end["text"] for end in raised if end not in owner
    )
    status = json.loads((out / "raise" / "status.json").read_text())
    assert status["status"] == "failed"
    # Rows that were predicted before it are committed and whole.
    kept = read_rows(out / "raise")
    assert [row["index"] for row in kept] == list(range(len(kept)))
    assert len(kept) >= 12


def test_the_job_after_a_failed_one_has_all_its_rows(out: Path) -> None:
    assert_proved(out / "after", 97)
    assert read_rows(out / "after") == read_rows(out / "last")


def test_another_batch_size_gives_the_same_classes_within_rounding(out: Path) -> None:
    for row, other in zip(read_rows(out / "after"), read_rows(out / "other-batch"), strict=True):
        assert row["prob"] == pytest.approx(other["prob"], abs=1e-6)
        if row["topk_prob"][0] - row["topk_prob"][1] > 1e-6:
            assert row["pred"] == other["pred"]


def test_too_many_errors_stop_and_a_higher_limit_continues(out: Path, end_of: Ends) -> None:
    assert [end["exit_code"] for end in end_of("limited")] == [3, 3, 3]
    assert [end["exit_code"] for end in end_of("limited-again")] == [3, 3, 3], (
        "nothing is left to do, and too much went wrong"
    )
    assert [end["exit_code"] for end in end_of("raised-limit")] == [0, 0, 0]
    assert_proved(out / "limited", 37, errors=1)
    assert read_rows(out / "limited") == read_rows(out / "recorded")


@pytest.mark.parametrize("mode", ["", "-shards"])
def test_a_stopped_job_is_preempted_on_all_and_resumes_to_the_same_rows(out: Path, end_of: Ends, mode: str) -> None:
    ends = end_of(f"stopped{mode}")
    assert [end["status"] for end in ends] == ["preempted"] * SIZE
    assert [end["exit_code"] for end in ends] == [75] * SIZE
    assert 0 < ends[0]["rows"] < MANY
    assert end_of(f"continued{mode}")[0]["rows_this_run"] == MANY - ends[0]["rows"]
    assert_proved(out / f"stopped{mode}", MANY)
    assert read_rows(out / f"stopped{mode}") == read_rows(out / f"whole{mode}")


def test_a_complete_folder_returns_its_summary(end_of: Ends) -> None:
    again = end_of("again")[0]
    assert again["status"] == "complete"
    assert again["rows"] == MANY
    assert "rows_this_run" not in again


def test_user_mistakes_are_one_line_on_all_ranks(out: Path, end_of: Ends) -> None:
    for case, words in {
        "another": "output.dir must hold this same job",
        "unwritable": "output.dir must be a writable folder",
        "missing-root": "data.root must be a readable folder",
        "two-processes": "strategy must be ddp",
    }.items():
        for end in end_of(case):
            assert end["exit_code"] == 2, case
            assert words in end["reason"]
            assert "\n" not in end["reason"]
    assert "model.weights" in end_of("another")[0]["reason"]


def test_dry_run_writes_nothing(out: Path, end_of: Ends) -> None:
    assert end_of("dry")[0]["samples"] == 97
    assert not (out / "dry").exists()


def test_an_older_result_stays_until_the_new_one_is_complete(out: Path, end_of: Ends) -> None:
    assert end_of("replacing")[0]["status"] == "preempted"
    assert_proved(out / "old halfway", 97)
    assert read_rows(out / "old halfway") == read_rows(out / "after")
    assert len(read_rows(out / "old halfway" / ".next")) == end_of("replacing")[0]["rows"]
    assert "output.dir must hold this same job" in end_of("meanwhile")[0]["reason"]
    assert end_of("replaced")[0]["rows_this_run"] == MANY - end_of("replacing")[0]["rows"]
    assert end_of("replaced")[0]["run_dir"] == str(out / "old")
    assert_proved(out / "old", MANY)
    assert read_rows(out / "old") == read_rows(out / "whole")
    assert not {".next", ".ready", ".old"} & {path.name for path in (out / "old").iterdir()}


def test_new_images_are_appended_and_vanished_ones_keep_their_rows(out: Path, end_of: Ends) -> None:
    assert [end["rows_this_run"] for end in end_of("grown")] == [3] * SIZE
    assert_proved(out / "growing", 23)
    rows = read_rows(out / "growing")
    assert rows[0]["path"] == "class0/image 0000.jpg"
    assert rows[0]["error"] is None
    new = [(row["path"], row["label"], row["error"]) for row in rows[20:]]
    assert new == [(f"class{n}/image {'0009x' if n else '0000'} {n}.png", n, None) for n in range(3)]


@pytest.mark.parametrize("how", ["parquet", "csv", "jsonl"])
def test_retried_rows_equal_those_of_a_run_without_errors(out: Path, end_of: Ends, how: str) -> None:
    assert end_of(f"failed-{how}")[0]["errors"] == 1
    assert [end["rows_this_run"] for end in end_of(f"retried-{how}")] == [1] * SIZE
    assert_proved(out / f"failed-{how}", 37)
    assert read_rows(out / f"failed-{how}") == read_rows(out / f"good-{how}")
    assert (out / f"failed-{how}" / "errors.jsonl").read_bytes() == b""


def test_retried_rows_of_an_array_equal_those_of_a_run_without_errors(out: Path, end_of: Ends) -> None:
    assert end_of("failed-npy")[0]["errors"] == 1
    assert_proved(out / "failed-npy", 37)
    retried, good = np.load(out / "failed-npy" / "predictions.npy"), np.load(out / "good-npy" / "predictions.npy")
    assert np.array_equal(retried, good)
    assert np.isfinite(retried).all()


def test_a_job_of_a_sweep_fails_on_all_ranks_or_on_none(out: Path) -> None:
    assert ended(out, "sweep", SIZE) == [["0", "rank 1 of 3: ValueError: only here", "2"]] * SIZE


def test_a_model_is_compiled_on_all_ranks_or_on_none(out: Path, end_of: Ends) -> None:
    for auto, on in end_of("one-cannot"):
        assert auto == "off"
        assert on.startswith("runtime.compile must be off where the model cannot be compiled, got 'on' (rank 1 of 3: ")
    assert {end["status"] for end in end_of("begun-before")} == {"complete"}
    assert json.loads((out / "last" / "manifest.json").read_text())["fingerprint"]["runtime.compile"] == "off"
