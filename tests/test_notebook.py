"""`mgpu_ddp.predict` in a Jupyter kernel and in a plain script: what travels, what comes back, and what goes wrong."""

import json
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import mgpu_ddp
from mgpu_ddp.config.allowlist import parse
from mgpu_ddp.errors import Exit, RunError, UsageError
from mgpu_ddp.notebook import send, source, words_of
from tests.support.starting import Ended, committed_rows, finish, run, started, wait_until, worker_pids

OWN = """
import mgpu_ddp, time, torch
from pathlib import Path
from torch import nn
from torch.utils.data import Dataset

class Net(nn.Module):
    def forward(self, pixels):
        return {"mean": pixels.mean((1, 2, 3))}

class Numbers(Dataset):
    def __init__(self, size=40):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if Path("slow").exists():
            time.sleep(0.05)
        return {"image": torch.full((3, 8, 8), float(index)), "key": f"n{index}"}
"""
"""The user's own code, whose classes no other process can import."""


class Dark(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        if index >= 4:
            raise ValueError(f"{index} is too dark")
        return torch.zeros(3, 8, 8)


class Mean(nn.Module):
    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"mean": pixels.mean((1, 2, 3))}


def cell_outputs(cells: list[str], folder: Path) -> list[dict[str, str]]:
    """Run cells in a kernel, and return what each shows: stdout, stderr and text/html."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(dedent(cell)) for cell in cells])
    NotebookClient(notebook, timeout=150, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    shown: list[dict[str, str]] = []
    for cell in notebook.cells:
        shown.append({})
        for output in cell.outputs:
            found = {output["name"]: output["text"]} if output.output_type == "stream" else output["data"]
            for name, text in found.items():
                shown[-1][name] = shown[-1].get(name, "") + text
    return shown


@pytest.mark.filterwarnings("default")
def test_in_a_notebook_calls_follow_each_other_and_a_ranks_error_has_its_traceback(tmp_path: Path) -> None:
    start = 'mgpu_ddp.predict(dataset=Numbers, processes=2, batch_size=4, seed=1, version="a", output_dir='
    cells = [
        f"""
        {OWN.replace(chr(10), chr(10) + "        ")}
        run = {start}"first", model=Net, outputs=lambda returned: {{"twice": 2 * returned["mean"]}})
        run
        """,
        f"""
        class Broken(Net):
            def forward(self, pixels):
                if pixels.max() >= 36:
                    raise ArithmeticError("36 is too many")
                return super().forward(pixels)
        try:
            {start.replace("processes=2", "processes=1")}"second", model=Broken)
        except Exception as error:
            failed = error
        print(type(failed).__name__, failed, failed.folder)
        """,
        "print(mgpu_ddp.open(failed.folder).summary['status'], run.table()['path'][-1])",
    ]
    first, second, third = cell_outputs(cells, tmp_path)
    assert "of 40 rows to do" in first["stderr"]
    assert ">rows</th>" in first["text/html"]
    opened = mgpu_ddp.open(tmp_path / "first")
    assert opened.table()["twice"].to_pylist() == [2.0 * i for i in range(40)]
    assert "RunError" in second["stdout"]
    assert "in forward" in second["stdout"]
    assert "ArithmeticError: 36 is too many" in second["stdout"]
    assert third["stdout"].split() == ["failed", "n39"]


@pytest.fixture
def script(tmp_path: Path) -> list[str]:
    """The command of a script that predicts 40 items, slowly while the file `slow` is there."""
    call = "mgpu_ddp.predict(model=Net, dataset=Numbers, processes=1, batch_size=2, output_dir='out',"
    settings = "output={'commit_every': 8}, loader={'workers': 1})"
    (tmp_path / "mine.py").write_text(f"{OWN}\nrun = {call} {settings}\nprint(run)\n")
    (tmp_path / "slow").touch()
    return [sys.executable, "mine.py"]


def test_ctrl_c_stops_a_script_resumably_and_its_summary_is_the_jobs(tmp_path: Path, script: list[str]) -> None:
    with started(script, tmp_path) as process:
        wait_until(lambda: committed_rows(tmp_path / "out") > 0, process)
        # As a terminal does.
        os.killpg(process.pid, signal.SIGINT)
        stopped = finish(process, tmp_path, 0)
        # At the moment in which the script has left.
        status = json.loads((tmp_path / "out/status.json").read_text())["status"]
    assert stopped.code == -signal.SIGINT
    assert stopped.err.splitlines()[-1] == "KeyboardInterrupt"
    assert status == "preempted"
    before = committed_rows(tmp_path / "out")
    assert 0 < before < 40
    (tmp_path / "slow").unlink()
    continued = run(script, tmp_path)
    assert continued.code == 0, continued.err
    assert f"{40 - before} of 40 rows to do" in continued.err
    opened = mgpu_ddp.open(tmp_path / "out")
    assert opened.table()["mean"].to_pylist() == [float(i) for i in range(40)]
    printed, found = summary_in(continued), opened.summary
    assert {name: found[name] for name in printed.keys() - {"exit_code", "columns"}} == {
        name: printed[name] for name in printed.keys() - {"exit_code", "columns"}
    }


@pytest.mark.slow
def test_ctrl_c_stops_a_script_whose_ranks_are_starting(tmp_path: Path, script: list[str]) -> None:
    with started(script, tmp_path) as process:
        wait_until(lambda: any(map(worker_pids, children(process.pid))), process)
        os.killpg(process.pid, signal.SIGINT)
        ended = finish(process, tmp_path, 0)
    assert ended.code == -signal.SIGINT
    assert "SignalException" not in ended.err
    assert not (tmp_path / "out").exists()


def children(pid: int) -> list[int]:
    return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def summary_in(ended: Ended) -> dict[str, Any]:
    summary = json.loads(next(line for line in ended.err.splitlines() if line.startswith("{")))
    assert isinstance(summary, dict)
    return summary


def test_too_many_errors_leave_a_run_that_opens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match="max_errors must be at least the errors found") as caught:
        mgpu_ddp.predict(model=Mean, dataset=Dark, output_dir=tmp_path / "a, 'b'", processes=1, max_errors=0)
    assert caught.value.exit_code == Exit.TOO_MANY_ERRORS
    assert caught.value.folder == tmp_path / "a, 'b'"
    assert "8 of 8 rows to do" in capsys.readouterr().err
    assert mgpu_ddp.open(caught.value.folder).errors()[0] == {
        "index": 4,
        "path": None,
        "reason": "ValueError: 4 is too dark",
    }


def test_a_mistake_that_ranks_find_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^sed must be a known key, got 'sed=1'") as caught:
        mgpu_ddp.predict(data="fake", output_dir=tmp_path / "out", processes=1, sed=1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


class Suicidal(Mean):
    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        if len(pixels) > 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(pixels)


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match="rank 0 was killed"):
        mgpu_ddp.predict(model=Suicidal, data="fake", output_dir=tmp_path / "out", processes=1, batch_size=4)
    assert "Signal 9 (SIGKILL)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        (False, False),
        (3, 3),
        (-2.5e-7, -2.5e-7),
        (float("inf"), float("inf")),
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        ("plain", "plain"),
        ("", ""),
        ("null", "null"),
        ("a, [b]={c}: 'd' \"e\" \\", "a, [b]={c}: 'd' \"e\" \\"),
        (Path("/a b/c"), "/a b/c"),
        ([1, "a,b", None], [1, "a,b", None]),
        ((), []),
    ],
)
def test_values_are_words_that_mean_the_same(value: Any, expected: Any) -> None:
    (override,) = parse([*words_of("data.root", value)])
    found = override.value()
    assert override.key_or_group == "data.root"
    found = [getattr(each, "text", each) for each in found] if isinstance(found, list) else found
    assert (found, type(found)) == (expected, type(expected))


def test_a_dict_is_a_word_for_each_of_its_keys() -> None:
    assert [*words_of("output", {"format": "csv", "topk": 2})] == ["output.format='csv'", "output.topk=2"]


@pytest.mark.parametrize("key", ["--config-dir", "+sweep", "hydra/launcher", "a=b", "", "a b", "~seed"])
def test_a_key_is_one_of_the_configuration(key: str) -> None:
    with pytest.raises(UsageError, match="override must be a key of the configuration"):
        [*words_of(key, 1)]


@pytest.mark.parametrize("value", [object(), {1, 2}, torch.float16, [1, object()], 1j])
def test_a_value_that_is_no_word_is_named(value: Any) -> None:
    with pytest.raises(UsageError, match=r"^seed must be text, a path, a number, .* Convert it\.$"):
        [*words_of("seed", value)]


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("fake", {"data": "fake"}),
        ("list", {"data": "list"}),
        ("./fake", {"data": "folder", "data.root": "./fake"}),
        ("photos", {"data": "folder", "data.root": "photos"}),
        (Path("photos.2024"), {"data": "folder", "data.root": "photos.2024"}),
        ("s3://bucket/photos/", {"data": "folder", "data.root": "s3://bucket/photos/"}),
        ("https://host/list.CSV", {"data": "list", "data.path": "https://host/list.CSV"}),
        (Path("list.txt"), {"data": "list", "data.path": "list.txt"}),
        ("images.npy", {"data": "array", "data.path": "images.npy"}),
        ("tars/{00..12}.tar", {"data": "webdataset", "data.urls": "tars/{00..12}.tar"}),
        ("parts/*.parquet", {"data": "parquet", "data.urls": "parts/*.parquet"}),
    ],
)
def test_the_source_follows_from_the_location(location: Any, expected: dict[str, str]) -> None:
    assert source(location) == expected


def test_a_folder_may_be_named_as_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "old.tar").mkdir()
    assert source(tmp_path / "old.tar") == {"data": "folder", "data.root": str(tmp_path / "old.tar")}


def locked() -> Callable[[], nn.Module]:
    lock = threading.Lock()

    def build() -> nn.Module:
        with lock:
            return Mean()

    return build


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"model": Mean()}, "model must be a function, got Mean"),
        ({"model": locked()}, "must be functions that can be pickled, got TypeError: cannot pickle '_thread.lock'"),
        ({"processes": 0}, "processes must be at least 1 or auto, got 0"),
        ({"processes": "all"}, "processes must be at least 1 or auto, got 'all'"),
        ({"dry_run": True}, "dry_run must be left out"),
    ],
)
def test_a_mistake_is_told_before_a_process_starts(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        mgpu_ddp.predict(**arguments)


def test_ranks_do_not_start_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="WORLD_SIZE must be 1 for predict"):
        mgpu_ddp.predict(model=Mean)


def test_a_model_that_was_trained_here_travels_as_it_is(tmp_path: Path) -> None:
    """With tied weights, buffers, and what asks for no gradient. On a GPU: tests/gpu/test_gpu.py."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    net[1].weight = net[0].weight
    net[1].bias.requires_grad_(False)
    send({"model": lambda: net}, tmp_path / "functions")
    sent = cloudpickle.loads((tmp_path / "functions").read_bytes())["model"]()
    assert sent[1].weight is sent[0].weight
    assert [each.requires_grad for each in sent.parameters()] == [each.requires_grad for each in net.parameters()]
    assert all(torch.equal(sent.state_dict()[name], tensor) for name, tensor in net.state_dict().items())


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
def test_functions_are_for_this_user_alone(tmp_path: Path) -> None:
    send({"outputs": lambda returned: returned + 1}, tmp_path / "functions")
    assert stat.S_IMODE((tmp_path / "functions").stat().st_mode) == 0o600
    assert cloudpickle.loads((tmp_path / "functions").read_bytes())["outputs"](1) == 2
