"""A terminal that is gone fails no job, and no name reaches one raw."""

import json
import os
import shlex
import sys
from pathlib import Path

import pytest

from tests.support import forks
from tests.support.runs import assert_proved, make_images
from tests.support.starting import SMALL, SMALL_IMAGES, launched, mgpu_infer, python_m, ranks, run, run_all

JOB = (*SMALL, "data.size=20", "output.dir=out")
SHELLS = {
    "both closed": (python_m, "{} >&- 2>&-"),
    "everything closed, ranks started by torchrun": (mgpu_infer, "{} <&- >&- 2>&-"),
    "the reader left": (python_m, "set -o pipefail; {{ {} 2>&1; echo $? >code; }} | true; exit $(cat code)"),
    "full disks": (python_m, "{} >/dev/full 2>/dev/full"),
}
RARE = ("both closed", "the reader left")
"""Their ways through the code are those of the others."""


@pytest.mark.parametrize("how", [pytest.param(how, marks=[pytest.mark.slow] * (how in RARE)) for how in SHELLS])
def test_output_that_nobody_takes_fails_no_job(tmp_path: Path, how: str) -> None:
    start, line = SHELLS[how]
    ended = run(["bash", "-c", line.format(shlex.join(start(*JOB)))], tmp_path)
    assert ended.code == 0, ended.err
    assert_proved(tmp_path / "out", 20)


@pytest.mark.parametrize("numbers", [(1,), (2,), (0, 1, 2)])
def test_a_mistake_is_refused_with_closed_output_as_well(tmp_path: Path, numbers: tuple[int, ...]) -> None:
    process = forks.fork(without, numbers, "batch_size=0", cwd=tmp_path)
    assert process.wait(60) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stderr.txt", "stdout.txt"]


def without(numbers: tuple[int, ...], *settings: str) -> None:
    """Be the command, started with these files closed."""
    from tests.support.starting import infer

    for number in numbers:
        os.close(number)
    for name in [("stdin", "stdout", "stderr")[number] for number in numbers]:
        setattr(sys, name, None)
        setattr(sys, f"__{name}__", None)
    infer(*settings)


def test_what_a_library_prints_ends_in_no_file_of_the_job(tmp_path: Path) -> None:
    process = forks.fork(open_after_start, cwd=tmp_path)
    assert process.wait(60) == 0
    assert (tmp_path / "mine.txt").read_text() == "", "a file that is opened later got the number of stdout"


def open_after_start() -> None:
    from mgpu_ddp.reporting.terminal import make_output_safe

    os.close(1)
    sys.stdout = sys.__stdout__ = None
    make_output_safe()
    with open("mine.txt", "w"):
        os.write(1, b"from a library")
        print("from here", flush=True)


def test_names_reach_neither_terminal_nor_log_raw(tmp_path: Path) -> None:
    evil = "\x1b[2J\x9b31m\r\n\u202egnp"
    make_images(tmp_path / "images", 8)
    bad = (tmp_path / "images" / "class0").rename(tmp_path / "images" / f"class{evil}")
    first = min(bad.iterdir())
    first.write_bytes(b"broken")
    first.rename(bad / f"a{evil}.jpg")
    settings = (*SMALL_IMAGES, "data=folder", f"data.root={tmp_path / 'images'}")
    commands = {
        "complete": ranks(1, *settings, "output.dir=out"),
        "raised": launched(1, *settings, "output.dir=out", "on_error=raise"),
        "planned": ranks(1, *SMALL, f"output.dir='{evil}'", "dry_run=true"),
        "key": ranks(1, f"ba{evil}d=3"),
        "value": ranks(1, *SMALL, f"model.weights='{evil}'"),
        "flag": ranks(1, f"--ba{evil}d"),
    }
    folders = [tmp_path / name for name in commands]
    for folder in folders:
        folder.mkdir()
    ended = dict(zip(commands, run_all(list(commands.values()), folders), strict=True))
    assert [each.code for each in ended.values()] == [0, 1, 0, 2, 2, 2]
    assert "class\\x1b[2J\\x9b31m\\r\\n\\u202egnp" in ended["complete"].err
    assert "a\\x1b[2J\\x9b31m\\r\\n\\u202egnp.jpg" in ended["raised"].err
    written = {name: each.out + each.err for name, each in ended.items()}
    written |= {str(log): log.read_text() for log in tmp_path.glob("*/out/logs/*")}
    for name, text in written.items():
        raw = {c for c in text if not c.isprintable()} - {"\n", "\t"}
        assert not raw, (name, text)
        assert "gnp" not in [line[:3] for line in text.splitlines()], name
    assert json.loads((tmp_path / "complete" / "out" / "status.json").read_text())["counts"]["error"] == 1
    assert len(ended["key"].err.splitlines()) == len(ended["value"].err.splitlines()) == 1
