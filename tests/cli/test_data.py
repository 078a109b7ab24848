"""The recipes of docs/data.md, run as they stand, and sources that break between two starts."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support import s3
from tests.support.runs import assert_proved, make_images, read_rows, recipes
from tests.support.sources import write_tar
from tests.support.starting import BIN, SMALL_IMAGES, TIMEOUT_S, ranks, run

RUNS = {"from-list": "photos/", "from-tars": "train-0", "from-parquet": "photos/", "from-bucket": "s3://photos/"}
"""The folder of each recipe whose images come as they are, and how its paths begin."""


@pytest.mark.slow
def test_every_recipe_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = recipes("data")
    # And one for an array, and one for boxes.
    assert len(commands) == len(RUNS) + 2
    assert all(command.count("\n") <= 10 for command in commands)
    wanted = sum(path.suffix == ".jpg" for path in make_images(tmp_path / "photos", 20, classes=2))
    environ = {"PATH": f"{BIN}:{os.environ['PATH']}"}
    # As they stand, but for names with spaces and a model that is large for this.
    for path in sorted((tmp_path / "photos").rglob("*.jpg")):
        path.rename(path.with_name(path.name.replace(" ", "-")))
    small = " ".join(SMALL_IMAGES)
    with s3.served(tmp_path, tmp_path / "log") as port:
        s3.use(monkeypatch, port)
        started = [
            subprocess.Popen(["bash", "-euc", command.rstrip() + f" {small}"], cwd=tmp_path, env=os.environ | environ)
            for command in commands
        ]
        try:
            assert [process.wait(TIMEOUT_S) for process in started] == [0] * len(commands)
        finally:
            for process in started:
                process.kill()
                process.wait()
    assert_proved(tmp_path / "from-array", wanted)
    assert all(row["path"] is None for row in read_rows(tmp_path / "from-array"))
    assert_proved(tmp_path / "from-boxes", 2 * wanted)
    boxed = [(row["box"], row["width"] > 0) for row in read_rows(tmp_path / "from-boxes")]
    assert boxed == [([0, 0, 20, 20], True), ([4.5, 2, 30, 24], True)] * wanted
    predictions = []
    for name, begin in RUNS.items():
        assert_proved(tmp_path / name, wanted)
        rows = read_rows(tmp_path / name)
        assert all(row["path"].startswith(begin) for row in rows)
        assert [row.get("album") for row in rows] == ["holiday" if name == "from-list" else None] * wanted
        predictions.append([(row["pred"], row["prob"]) for row in rows])
    assert all(each == predictions[0] for each in predictions)


def test_a_tar_that_breaks_between_two_starts_is_one_line_and_nothing_is_lost(tmp_path: Path) -> None:
    images = make_images(tmp_path / "photos", 24)
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", images[number * 8 : number * 8 + 8], [0] * 8)
    settings = ("data=webdataset", "data.urls=*.tar", *SMALL_IMAGES, "output.dir=out")
    assert run(ranks(1, *settings, "limit=8"), tmp_path).code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    whole = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[:5000])
    broken = run(ranks(1, *settings, "limit=12"), tmp_path)
    assert broken.code == 2
    lines = [line for line in broken.err.splitlines() if line.startswith("mgpu_ddp: ")]
    assert len(lines) == 1
    assert f"the tar '{tmp_path}/1.tar' is broken at byte " in lines[0]
    assert "Traceback" not in broken.err
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    (tmp_path / "1.tar").write_bytes(whole)
    assert run(ranks(1, *settings, "limit=12"), tmp_path).code == 0
    assert_proved(tmp_path / "out", 12)
