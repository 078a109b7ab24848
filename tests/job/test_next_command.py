"""The command that continues a job: its words, and the line that a shell gets."""

import os
import subprocess
from pathlib import Path

import pytest

from mgpu_ddp.config.allowlist import parse
from mgpu_ddp.config.paths import as_typed
from mgpu_ddp.distributed.command import StartCommand
from mgpu_ddp.job.next_command import next_words, shell_line

RUN = ["torchrun", "--standalone", "-m", "mgpu_ddp.infer"]
OUT = Path("/data/out")


def words(*typed: str, sweep: bool = False, extra: tuple[str, ...] = ()) -> list[str]:
    start = StartCommand(words=(*RUN, *typed), cwd="/data")
    return next_words(start, OUT, sweep=sweep, words=extra)[len(RUN) :]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ([], ["output.dir=/data/out"]),
        (["seed=1", "output.dir=out"], ["seed=1", "output.dir=out"]),
        (["output.dir=out/", "seed=1"], ["output.dir=out/", "seed=1"]),
        (["hydra.run.dir=/data/out"], ["hydra.run.dir=/data/out"]),
        (["output.dir=runs/${now:%H}"], ["output.dir=/data/out"]),
        (["hydra.run.dir=${now:%H}", "seed=1"], ["seed=1", "output.dir=/data/out"]),
        (["overwrite=true", "++resume=false", "output.dir=out"], ["output.dir=out"]),
        (["retry_failed=true", "output.dir=out"], ["retry_failed=true", "output.dir=out"]),
    ],
)
def test_it_has_what_was_typed_in_the_same_folder_and_never_starts_anew(typed: list[str], expected: list[str]) -> None:
    assert words(*typed) == expected


def test_what_the_job_lacked_comes_in_the_place_of_what_was_typed() -> None:
    typed = ("max_errors=3", "output.dir=out")
    assert words(*typed, extra=("max_errors=null",)) == ["output.dir=out", "max_errors=null"]


def test_a_sweep_continues_in_its_own_folder_and_so_do_its_jobs_that_started_apart() -> None:
    typed = ("-m", "seed=1,2")
    sweeps = words(*typed, sweep=True)
    assert sweeps == [*typed, "hydra.sweep.dir=/data/out"]
    assert words(*sweeps) == sweeps


@pytest.mark.parametrize("name", ["a b", "it's", "${x}", "null", "a\\,b", "{x}=1,2", "日本", "~"])
def test_a_folder_of_any_name_is_found_again(name: str) -> None:
    start = StartCommand(words=("mgpu-infer",), cwd="/data")
    _, word = next_words(start, Path("/data") / name, sweep=False)
    value = parse([as_typed(word, sweeps=False)])[0].value()
    assert str(value).replace("\\${", "${") == f"/data/{name}"


def test_a_shell_reads_the_line_as_it_was_meant(tmp_path: Path) -> None:
    folder = tmp_path / "it's here"
    folder.mkdir()
    hostile = [
        "a b",
        "it's",
        "$HOME",
        "`id`",
        "a;b&c|d>e",
        "line\nbreak",
        "tab\t'\\",
        os.fsdecode(b"caf\xe9"),
        "日本",
        "\x1b[31m",
    ]
    line = shell_line(StartCommand(words=(), cwd=str(folder)), ["printf", "%s\\0", *hostile])
    assert line.isprintable()
    said = subprocess.run(["bash", "-c", f"{line}; pwd"], cwd="/", capture_output=True, check=True).stdout
    assert said.split(b"\0") == [*map(os.fsencode, hostile), os.fsencode(f"{folder}\n")]
