"""Scripts that bring a model of their own to the command."""

from pathlib import Path

import pytest

from tests.support.runs import assert_proved, read_rows
from tests.support.scripts import script
from tests.support.starting import run

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
    ended = run(script(1, write(tmp_path, forward), *FAKE, *SETTINGS), tmp_path)
    assert ended.code == 2
    (line,) = [each for each in ended.err.splitlines() if each.startswith("mgpu_ddp: ")]
    assert line.startswith("mgpu_ddp: model: forward, or outputs")
    assert why in line
    assert line.endswith(remedy)
    assert not (tmp_path / "out").exists()


def test_columns_of_ones_own_stand_beside_keys_without_labels(tmp_path: Path) -> None:
    path = write(tmp_path, 'return {"finite": images.amax((1, 2, 3))}', "dataset=Squares")
    ended = run(script(2, path, "transform.name=plain", *SETTINGS), tmp_path)
    assert ended.code == 0, ended.err
    assert_proved(tmp_path / "out", 9)
    expected = [(f"square {i}", pytest.approx(20 * i / 255)) for i in range(9)]
    assert [(row["path"], row["finite"]) for row in read_rows(tmp_path / "out")] == expected
