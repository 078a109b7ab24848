"""Every way of starting gives one proved table in one folder."""

import gzip
import importlib.util
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mgpu_ddp.version import version_text
from tests.support.runs import LAUNCH, assert_proved, make_images, read_rows
from tests.support.starting import (
    BIN,
    SMALL,
    SMALL_IMAGES,
    forked_mgpu_infer,
    launched,
    mgpu_infer,
    python_m,
    ranks,
    run,
    run_all,
    torchrun,
)


@pytest.mark.parametrize("size", [pytest.param(1000, marks=pytest.mark.slow), 120])
def test_torchrun_with_four_processes(tmp_path: Path, size: int) -> None:
    """The command on the box, without arguments: FakeData, the tutorial's transform, ResNet18. And a short one."""
    words = [] if size == 1000 else [f"data.size={size}"]
    ended = run(torchrun(4, *words, options=()), tmp_path)
    assert ended.code == 0, ended.err
    summary = ended.summary
    run_dir = Path(summary["run_dir"])
    assert [run_dir] == list(tmp_path.glob("outputs/*/*")), "one folder, whatever the number of ranks"
    assert_proved(run_dir, size)
    assert (summary["samples"], summary["rows"], summary["predictions"]) == (size, size, [size, 1000])
    assert (summary["missing"], summary["duplicates"], summary["world_size"]) == (0, 0, 4)
    assert f"predictions ({size}, 1000)" in ended.out
    assert sorted(p.name for p in (run_dir / ".hydra").iterdir()) == ["config.yaml", "hydra.yaml", "overrides.yaml"]
    assert [p.name for p in (run_dir / "logs").iterdir()] == ["rank0.log"]
    assert "CUDA not used: 4 processes" in ended.err
    assert ended.err.count("random weights") == 1, "INFO comes from rank 0 alone"
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert [rank["rows"] for rank in metrics["ranks"]] == [size // 4] * 4
    assert f"bottleneck: {metrics['bottleneck']}, {metrics['bottleneck_share']:.0%} of the ranks' time" in ended.out
    assert metrics["images_per_s"] > metrics["images_per_s_with_startup"] > 0
    # One batch a rank is too short for a rate.
    assert ("images/s steady" in ended.out) == (size == 1000)
    assert size < 1000 or metrics["bottleneck"] in ("forward", "generate")


def test_python_m_and_torchrun_give_the_same_rows(tmp_path: Path, images: Path) -> None:
    settings = (*SMALL_IMAGES, "data=folder", f"data.root={images}")
    one = run(ranks(1, *settings, f"hydra.run.dir={tmp_path / 'one'}"), tmp_path)
    assert one.code == 0, one.err
    traced = run(ranks(2, *settings, "output.dir=two", "output.format=jsonl", "runtime.profile=true"), tmp_path)
    assert traced.code == 0, traced.err
    for rank in range(2):
        with gzip.open(tmp_path / "two" / "profile" / f"rank{rank}.json.gz") as file:
            names = {event.get("name") for event in json.load(file)["traceEvents"]}
        assert {"predict", "aten::conv2d"} <= names
    assert_proved(tmp_path / "one", 41)
    assert_proved(tmp_path / "two", 41)
    assert (tmp_path / "two" / ".hydra").is_dir()
    assert not (tmp_path / "outputs").exists()
    wide, narrow = read_rows(tmp_path / "one"), read_rows(tmp_path / "two")
    assert [(r["index"], r["path"], r["pred"], r["topk_index"]) for r in wide] == [
        (r["index"], r["path"], r["pred"], r["topk_index"]) for r in narrow
    ]
    assert np.array_equal(
        np.array([r["topk_prob"] for r in wide], np.float32), np.array([r["topk_prob"] for r in narrow], np.float32)
    )


def test_embeddings_in_half_precision_go_to_an_array_or_to_parquet(tmp_path: Path, images: Path) -> None:
    settings = (*SMALL_IMAGES, "data=folder", f"data.root={images}", "output.fields=[embedding]", "output.dtype=fp16")
    in_array = run(ranks(2, *settings, "output.dir=array", "output.format=npy"), tmp_path)
    assert in_array.code == 0, in_array.err
    assert run(ranks(1, *settings, "output.dir=table"), tmp_path).code == 0
    array = np.load(tmp_path / "array" / "predictions.npy")
    assert (array.dtype, array.shape) == (np.float16, tuple(in_array.summary["predictions"]))
    rows = read_rows(tmp_path / "table")
    assert all(row["error"] is None for row in rows)
    part = next((tmp_path / "table" / "predictions").iterdir())
    assert pq.read_schema(part).field("embedding").type.value_type == pa.float16()
    assert np.array_equal(array, np.array([row["embedding"] for row in rows], np.float16))
    assert array.std() > 0
    refused = run(ranks(1, *settings, "output.format=csv"), tmp_path)
    assert refused.code == 2
    assert "output.dtype must be fp32 with output.format=csv or jsonl" in refused.err


def test_data_parallel_gives_the_same_rows_as_ddp(tmp_path: Path) -> None:
    for strategy in ("ddp", "data_parallel"):
        command = ranks(1, *SMALL, "data.size=50", f"strategy={strategy}", f"output.dir={strategy}")
        assert run(command, tmp_path).code == 0
    assert read_rows(tmp_path / "ddp") == read_rows(tmp_path / "data_parallel")


def test_mgpu_infer_starts_torchrun_and_returns_its_workers_code(tmp_path: Path, images: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "x.jpg").write_bytes(b"no")
    over_bad = (*SMALL_IMAGES, "data=folder", f"data.root={bad}", "max_errors=0", "output.dir=out")
    commands = {
        "complete": mgpu_infer(*SMALL, "data.size=20", "output.format=npy", "output.dir=out"),
        "too many": forked_mgpu_infer(*over_bad),
        "raised": forked_mgpu_infer(*over_bad, "on_error=raise"),
    }
    folders = [tmp_path / name for name in commands]
    for folder in folders:
        folder.mkdir()
    complete, too_many, raised = run_all(list(commands.values()), folders)
    assert complete.code == 0, complete.err
    assert "s of start-up: too short for a steady rate" in complete.out
    assert np.load(tmp_path / "complete" / "out" / "predictions.npy", mmap_mode="r").shape == (20, 12)
    assert too_many.code == 3, too_many.err
    assert json.loads((tmp_path / "too many" / "out" / "status.json").read_text())["status"] == "failed"
    assert raised.code == 1
    # torchrun does not repeat, in a line or with a stack, what one line has said.
    assert "x.jpg" in raised.err
    assert "Traceback" not in raised.err
    assert "exitcode" not in raised.err + too_many.err


@pytest.mark.parametrize("name", ["it's {x}=(日本), $$#1 ", "-My Photos\\~"])
def test_a_path_is_taken_as_typed_however_the_command_starts(tmp_path: Path, name: str) -> None:
    make_images(tmp_path / name, 6)
    settings = (*SMALL_IMAGES, "data=folder", f"data.root={tmp_path}/{name}", f"output.dir={name}")
    # torchrun itself makes one $ of two.
    ways = {"mgpu-infer": forked_mgpu_infer, "alone": partial(ranks, 1), "torchrun": partial(launched, 1)}
    if "$$" in name:
        del ways["torchrun"]
    for way in ways:
        (tmp_path / way).mkdir()
    commands = [start(*settings) for start in ways.values()]
    for way, ended in zip(ways, run_all(commands, [tmp_path / way for way in ways]), strict=True):
        assert ended.code == 0, ended.err
        assert ended.summary["run_dir"] == f"{tmp_path}/{way}/{name}"
        assert_proved(tmp_path / way / name, 6)
    again = run(ranks(1, *settings), tmp_path / "alone")
    assert (again.code, again.summary["run_dir"]) == (0, f"{tmp_path}/alone/{name}"), again.err
    shown = run([sys.executable, "-m", "mgpu_ddp.report", f"run={name}"], tmp_path / "alone")
    assert shown.summary == {"report": f"{tmp_path}/alone/{name}/report.html"}, shown.err


def test_python_m_mgpu_ddp_is_mgpu_infer_which_tells_a_mistake_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "version").mkdir()
    commands = [[sys.executable, "-m", "mgpu_ddp", word] for word in ("batch_size=0", "--version")]
    mistaken, told = run_all(commands, [tmp_path, tmp_path / "version"])
    assert mistaken.code == 2
    assert mistaken.err == "mgpu_ddp: batch_size must be at least 1 or auto, got 0. Try batch_size=32.\n"
    assert told.code == 0, told.err
    assert told.out == f"{version_text()}\n"


def test_an_interpreter_without_the_package_is_refused_and_no_other_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "python"
    other.symlink_to("/bin/false")
    monkeypatch.setenv("PYTHON", str(other))
    ended = run([str(LAUNCH / "local.sh"), *SMALL], tmp_path)
    assert ended.code == 2
    assert f"mgpu_ddp is not installed for {other}." in ended.err
    assert not (tmp_path / "outputs").exists()


def test_a_job_waits_neither_for_pandas_nor_for_a_compiler(tmp_path: Path, images: Path) -> None:
    assert importlib.util.find_spec("pandas"), "or there is nothing to keep out"
    command = python_m(*SMALL_IMAGES, "data=folder", f"data.root={images}")
    ended = run([sys.executable, "-X", "importtime", *command[1:]], tmp_path)
    assert ended.code == 0, ended.err
    imported = [line.split("|")[-1].strip() for line in ended.err.splitlines() if line.startswith("import time:")]
    assert "pyarrow.parquet.core" in imported
    assert not [name for name in imported if name.startswith(("pandas.", "torch._dynamo", "sympy"))]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_wheel_runs_in_an_environment_that_holds_nothing_else(tmp_path: Path) -> None:
    """pyproject names every package that is imported, and the wheel carries the configuration and the templates."""
    root = Path(__file__).parents[2]
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(root)]
    subprocess.run(build, check=True, capture_output=True, timeout=200)
    (wheel,) = tmp_path.glob("*.whl")
    uv = str(BIN / "uv")
    python = tmp_path / "clean" / "bin" / "python"
    subprocess.run([uv, "venv", "--python", sys.executable, str(tmp_path / "clean")], check=True, capture_output=True)
    install = [uv, "pip", "install", "--python", str(python), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=500)
    command = [str(python.parent / "torchrun"), *torchrun(2, *SMALL, "data.size=20", "output.dir=out")[1:]]
    ended = run(command, tmp_path)
    assert ended.code == 0, ended.err
    assert_proved(tmp_path / "out", 20)
    assert (tmp_path / "out" / "report.html").exists()
    apart = ["+sweep=batch_size", "batch_size=4", "sweep.repeats=1", "hydra.sweep.dir=sweep", "hydra/launcher=torchrun"]
    ended = run([str(python), "-m", "mgpu_ddp.infer", *SMALL, "data.size=20", *apart], tmp_path)
    assert ended.code == 0, ended.err
    assert_proved(tmp_path / "sweep" / "0", 20)
