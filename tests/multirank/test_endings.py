"""How jobs end: together on all ranks, with what was committed kept, and the next job unharmed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mgpu_ddp.errors import PeerFailedError
from mgpu_ddp.world import World, share_weights
from tests.conftest import assert_proved, make_images, read_rows
from tests.multirank.worlds import Case, ended, folder, run_world, tiny

SIZE = 3
MANY = 4000


def buffers_from_rank_0(world: World) -> dict[str, Any]:
    """Give the ranks different weights and BatchNorm statistics, share them, and say what each ended with."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.fill_(world.rank + 1)
    shared = share_weights(module)
    return {name: value.double().flatten().tolist() for name, value in shared.state_dict().items()}


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


def jobs(root: Path, bad: Path) -> list[Case]:
    steps = {"commit_every": 48}
    stopped = tiny(data={"size": MANY}, output=steps)
    stopped_shards = tiny(data={"size": MANY}, output={**steps, "collect": "shards", "format": "jsonl"})
    resumed = {"data": {"size": MANY}, "output": {"collect": "shards", "format": "jsonl"}}
    return [
        Case(name="buffers", call=buffers_from_rank_0),
        Case(name="block", call=fails_on_rank_1),
        Case(name="topics", call=at_different_topics),
        Case(name="raise", config=tiny(data=folder(bad), on_error="raise", output={"commit_every": 12})),
        Case(name="after", config=tiny()),
        Case(name="recorded", config=tiny(data=folder(bad))),
        Case(name="limited", config=tiny(data=folder(bad), max_errors=0, output={"commit_every": 12})),
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
        Case(name="last", config=tiny()),
    ]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("endings")
    paths = make_images(root / "bad", 37)
    paths[35].write_bytes(b"broken")
    run_world(SIZE, jobs(root / "out", root / "bad"), root / "out")
    return root / "out"


@pytest.fixture(scope="module")
def end_of(out: Path) -> Callable[[str], list[Any]]:
    return lambda case: ended(out, case, SIZE)


Ends = Callable[[str], list[Any]]


def test_weights_and_statistics_come_from_rank_0(end_of: Ends) -> None:
    first, *others = end_of("buffers")
    assert all(value == 1 for values in first.values() for value in values)
    assert all(other == first for other in others)


def test_a_block_fails_on_all_or_none(end_of: Ends) -> None:
    assert end_of("block") == [
        "rank 1 of 3 raised ValueError: only here",
        "my own",
        "rank 1 of 3 raised ValueError: only here",
    ]


def test_ranks_at_different_topics_find_out(end_of: Ends) -> None:
    assert all("must be at" in text and text.startswith("ProtocolError") for text in end_of("topics"))


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
    # What was predicted before it is committed and whole.
    kept = read_rows(out / "raise")
    assert [row["index"] for row in kept] == list(range(len(kept)))
    assert len(kept) >= 12


def test_the_next_job_is_unharmed(out: Path) -> None:
    assert_proved(out / "after", 97)
    assert read_rows(out / "after") == read_rows(out / "last")


def test_too_many_errors_stop_and_a_higher_limit_continues(out: Path, end_of: Ends) -> None:
    assert [end["exit_code"] for end in end_of("limited")] == [3, 3, 3]
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
