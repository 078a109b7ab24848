"""Scripts that bring a model of their own to the command."""

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2

from mgpu_ddp.merge import merge
from tests.support.runs import LAUNCH, assert_proved, make_images, read_rows
from tests.support.starting import BIN, TIMEOUT_S, run, run_all, script_ranks

README = Path(__file__).parents[2] / "README.md"
OWN = README.parent / "docs" / "own.md"
SETTINGS = ("transform.size=32", "batch_size=4", "loader.workers=1", "output.dir=out")
FAKE = ("data.size=8", "data.image_size=[3,32,32]")
SCRIPT = """
import mgpu_ddp
import numpy as np
import torch

class Net(torch.nn.Module):
    def forward(self, images):
        {forward}

class Squares:
    def __len__(self):
        return 9

    def __getitem__(self, i):
        return {{"image": np.full((20, 30, 3), 20 * i, np.uint8), "key": f"square {{i}}"}}

if __name__ == "__main__":
    mgpu_ddp.main(model=Net, {arguments})
"""


def write(folder: Path, forward: str, arguments: str = "") -> Path:
    path = folder / "mine.py"
    path.write_text(SCRIPT.format(forward=forward, arguments=arguments))
    return path


@pytest.mark.parametrize(
    ("forward", "why", "remedy"),
    [
        (
            "return images @ torch.ones(3, 2)",
            "raised RuntimeError: ",
            " (mine.py, line 8) for a batch of (2, 3, 32, 32). Fix it and start again.",
        ),
        (
            "return images.mean((2, 3)), 3",
            ", got tuple of 2 [float32 Tensor (2, 3), int]",
            "Correct what forward, or outputs=, returns.",
        ),
    ],
)
def test_a_forward_that_cannot_be_used_is_one_line_and_leaves_no_folder(
    tmp_path: Path, forward: str, why: str, remedy: str
) -> None:
    ended = run(script_ranks(1, write(tmp_path, forward), *FAKE, *SETTINGS), tmp_path)
    assert ended.code == 2
    (line,) = [each for each in ended.err.splitlines() if each.startswith("mgpu_ddp: ")]
    assert line.startswith("mgpu_ddp: model: forward, or outputs")
    assert why in line
    assert line.endswith(remedy)
    assert not (tmp_path / "out").exists()


def test_a_model_without_layers_gives_classes_but_no_embedding(tmp_path: Path) -> None:
    path = write(tmp_path, "return images.mean((2, 3))")
    ended = run(script_ranks(1, path, *FAKE, *SETTINGS), tmp_path)
    assert ended.code == 0, ended.err
    ended = run(script_ranks(1, path, *FAKE, *SETTINGS, "output.fields=[topk,embedding]", "overwrite=true"), tmp_path)
    assert ended.code == 2, ended.err
    rule = "without embedding for a model that has no linear or convolutional layer"
    assert f"mgpu_ddp: output.fields must be {rule}, got ['topk', 'embedding']. Leave it out." in ended.err
    assert "Traceback" not in ended.err


def test_columns_of_ones_own_stand_beside_keys_without_labels(tmp_path: Path) -> None:
    path = write(tmp_path, 'return {"finite": images.amax((1, 2, 3))}', "dataset=Squares")
    ended = run(script_ranks(2, path, "transform.name=plain", *SETTINGS), tmp_path)
    assert ended.code == 0, ended.err
    assert_proved(tmp_path / "out", 9)
    expected = [(f"square {i}", pytest.approx(20 * i / 255)) for i in range(9)]
    assert [(row["path"], row["finite"]) for row in read_rows(tmp_path / "out")] == expected


def test_shards_of_a_dataset_are_merged(tmp_path: Path) -> None:
    path = write(tmp_path, 'return {"grey": images.amax((1, 2, 3))}', "dataset=Squares")
    settings = ("transform.name=plain", *SETTINGS[:-1])
    folders = [tmp_path / f"from {i}" for i in range(2)]
    for folder in folders:
        folder.mkdir()
    shards = [script_ranks(1, path, *settings, f"shard={i}/2", f"output.dir={tmp_path}/out/{i}") for i in range(2)]
    for ended in run_all(shards, folders):
        assert ended.code == 0, ended.err
    assert merge(tmp_path / "out")["rows"] == 9
    assert_proved(tmp_path / "out", 9)
    assert [row["path"] for row in read_rows(tmp_path / "out")] == [f"square {i}" for i in range(9)]
    # What was merged is the job without shards, and done.
    parts = json.loads((tmp_path / "out" / "manifest.json").read_text())["parts"]
    ended = run(script_ranks(1, path, *settings, "output.dir=out"), tmp_path)
    assert ended.code == 0, ended.err
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["parts"] == parts


def written(document: Path, folder: Path) -> list[str]:
    """Write the script that a page shows under the name it gives it; return the commands that start it."""
    text = document.read_text()
    (code,) = re.findall(r"<!-- script -->\n```python\n(.*?)```", text, re.DOTALL)
    (folder / code.splitlines()[0].removeprefix("# ")).write_text(code)
    (recipe,) = re.findall(r"<!-- recipe -->\n```bash\n(.*?)```", text, re.DOTALL)
    return str(recipe).splitlines()


def start(command: str, folder: Path) -> None:
    environ = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", command], cwd=folder, env=environ, timeout=TIMEOUT_S, check=True)


@pytest.mark.slow
def test_the_readme_s_script_runs(tmp_path: Path) -> None:
    (command,) = written(README, tmp_path)
    torch.save(torchvision.models.resnet18(num_classes=3).state_dict(), tmp_path / "net.pt")
    make_images(tmp_path / "photos", 5)
    start(f"{command} transform.size=32 output.dir=out", tmp_path)
    assert_proved(tmp_path / "out", 5)
    assert {row["pred"] for row in read_rows(tmp_path / "out")} <= {0, 1, 2}


@pytest.mark.slow
def test_every_way_of_starting_a_script_gives_the_same_rows(tmp_path: Path) -> None:
    commands = written(OWN, tmp_path)
    local = f"SCRIPT=mine.py PROCESSES=2 {LAUNCH}/local.sh"
    commands.append(re.sub("^python mine.py (.*)=alone", rf"{local} \1=by-local", commands[-1]))
    make_images(tmp_path / "photos", 5)
    tables = []
    for command in commands:
        start(command, tmp_path)
        folder = tmp_path / command.split("output.dir=")[1]
        assert_proved(folder, 5)
        tables.append(read_rows(folder))
    assert len(tables) == 4
    assert all(table == tables[0] for table in tables)
    transform = v2.Compose([v2.Resize((224, 224)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    for row in tables[0]:
        with Image.open(tmp_path / "photos" / row["path"]) as image:
            pixels = transform(image.convert("RGB"))
        assert row["mean"] == pytest.approx(pixels.mean().item(), abs=1e-3)
        assert sum(row["histogram"]) == pixels.numel()


@pytest.mark.slow
def test_the_frames_of_a_video_are_those_that_were_put_in(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    (frames,) = re.findall(r"```python\n(class Frames.*?)```", OWN.read_text(), re.DOTALL)
    with av.open(str(tmp_path / "video.mp4"), "w") as video:
        stream = video.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 64, "yuv420p", 6
        for i in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 12 * i, np.uint8), format="rgb24")
            video.mux(stream.encode(frame))
        video.mux(stream.encode())
    forward = 'return {"grey": images.mean((1, 2, 3))}'
    path = write(tmp_path, forward, "dataset=Frames")
    path.write_text(
        path.read_text().replace("class Squares", f"import av\nPATH = 'video.mp4'\n\n{frames}\nclass Squares")
    )
    ended = run(script_ranks(2, path, "transform.name=plain", "loader.block=8", *SETTINGS), tmp_path)
    assert ended.code == 0, ended.err
    assert_proved(tmp_path / "out", 20)
    for i, row in enumerate(read_rows(tmp_path / "out")):
        assert (row["path"], row["time"]) == (f"{i:08d}", pytest.approx(i / 10))
        assert row["grey"] * 255 == pytest.approx(12 * i, abs=4)


def test_what_comes_after_main_runs_in_every_rank_once_all_is_well(tmp_path: Path) -> None:
    script = write(tmp_path, "return {'mean': images.mean((1, 2, 3))}")
    body = """
    import os, signal, sys
    handlers = [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)]
    argv = list(sys.argv)
    summary = mgpu_ddp.main(model=Net)
    assert [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)] == handlers
    assert sys.argv == argv
    rows = mgpu_ddp.open(summary["run_dir"]).table().num_rows if summary else None
    print("after", os.environ.get("RANK", "0"), rows, flush=True)
"""
    script.write_text(script.read_text().partition("    mgpu_ddp.main(")[0] + body)
    folders = [tmp_path / name for name in ("two", "version", "stopped")]
    for folder in folders:
        folder.mkdir()
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    bad = ("data=folder", f"data.root={tmp_path}", "max_errors=0")
    commands = [
        script_ranks(2, script, *FAKE, *SETTINGS),
        script_ranks(1, script, "--version"),
        script_ranks(1, script, *bad, *SETTINGS),
    ]
    two, version, stopped = run_all(commands, folders)
    assert (two.code, version.code, stopped.code) == (0, 0, 3), two.err + version.err + stopped.err
    assert sorted(line for line in two.out.splitlines() if line.startswith("after")) == ["after 0 8", "after 1 8"]
    assert version.out.endswith("\nafter 0 None\n")
    assert "\nafter " not in stopped.out
