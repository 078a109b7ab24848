"""What the batch scripts start, word by word: what is typed reaches mgpu_ddp as it is, and no shell reads it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from mgpu_ddp.config.command_line import check_command
from tests.conftest import registered
from tests.support.runs import LAUNCH

__all__ = ["registered"]

GOLDEN = Path(__file__).parent / "golden"
ACCEPT = "MGPU_DDP_ACCEPT_GOLDEN"
HERE = {
    "SLURM_JOB_ID": "123",
    "SLURM_JOB_NODELIST": "a[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_CPUS_PER_NODE": "16(x2)",
}
HOSTILE = [
    *("; touch marker", "$(touch marker)", "`touch marker`", "| touch marker", "& touch marker", "&& touch marker"),
    *("|| touch marker", "> marker", ">> marker", "< marker", "\n touch marker", "' ; touch marker ; '"),
    *('" ; touch marker ; "', "'$(touch marker)'", '"$(touch marker)"', "\\$(touch marker)", "${IFS}touch marker"),
    *("$IFS", "$0", "$@", "$$", "!!", "~", "~root", "*", "?", "[a-z]", "{a,b}", "(touch marker)", "{ touch marker; }"),
    *(
        "-c touch marker",
        "--help",
        "-h",
        "--",
        "#",
        "\\",
        "'",
        '"',
        "a b",
        "\t",
        "☃",
        "%j",
        "eval touch marker",
        "=",
        ",",
    ),
]


def started(
    tmp_path: Path, script: str, *arguments: str, **environ: str
) -> tuple["subprocess.CompletedProcess[str]", list[str]]:
    """Run a script where SLURM's commands only write down what they were asked; returns srun's words."""
    commands = tmp_path / "commands"
    commands.mkdir(exist_ok=True)
    written = tmp_path / "srun"
    bodies = {
        "srun": f'printf "%s\\0" "$@" > {written}; env | grep -E "^(SRUN|OMP|TORCH|MGPU)_" | sort > {written}.env',
        "scontrol": 'case "$2" in hostnames) [ -z "$3" ] || printf "a1\\na2\\n" ;; '
        f'job) echo "JobId=123 Command={LAUNCH}/slurm.sbatch WorkDir=/x" ;; esac',
        "python3": "exit 0",
    }
    for name, body in bodies.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    kept = {"PATH": f"{commands}:/usr/bin:/bin", "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        env=kept | HERE | environ,
        cwd=work,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert not list(work.iterdir()), "nothing but srun was to do anything"
    return done, written.read_text().split("\0")[:-1] if written.exists() else []


def assert_golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if ACCEPT in os.environ:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    known = path.read_text() if path.exists() else ""
    assert text == known, f"accept the change by {ACCEPT}=1 pytest {Path(__file__).name}"


CASES: dict[str, tuple[str, list[str], dict[str, str]]] = {
    "two_nodes": ("slurm.sbatch", ["data=folder", "data.root=/a b"], {"SLURM_GPUS_ON_NODE": "4"}),
    "one_node_cpus": (
        "slurm.sbatch",
        ["output.dir=mine"],
        {"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_CPUS_PER_NODE": "8"},
    ),
    "knobs": (
        "slurm.sbatch",
        [],
        {
            "PROCESSES": "3",
            "MAX_RESTARTS": "2",
            "RUN_DIR": "it's",
            "PORT": "12345",
            "SLURM_JOB_CPUS_PER_NODE": "9,4(x2)",
        },
    ),
    "array": (
        "slurm_array.sbatch",
        ["limit=9"],
        {
            "SLURM_ARRAY_JOB_ID": "77",
            "SLURM_ARRAY_TASK_ID": "3",
            "SLURM_ARRAY_TASK_MAX": "7",
            "SLURM_JOB_NUM_NODES": "1",
        },
    ),
    "sweep": ("slurm_sweep.sbatch", ["+sweep=batch_size"], {"SLURM_GPUS_ON_NODE": "8"}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_started(case: str, tmp_path: Path) -> None:
    script, arguments, environ = CASES[case]
    done, words = started(tmp_path, script, *arguments, **environ)
    # The recorder leaves no run folder, so no job was complete.
    assert done.returncode == 1, done.stderr
    assert_golden(f"{case}.txt", "\n".join([*words, "--", (tmp_path / "srun.env").read_text()]))


@pytest.mark.parametrize("word", HOSTILE)
def test_what_is_typed_reaches_the_command_as_it_is(
    word: str, tmp_path: Path, registered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, before = started(tmp_path, "slurm.sbatch")
    assert plain.returncode == 1
    _, words = started(tmp_path, "slurm.sbatch", word, f"data.root={word}")
    assert words == [*before, word, f"data.root={word}"]
    if "\n" not in word:
        _, words = started(tmp_path, "slurm.sbatch", RUN_DIR=word)
        assert words == before
        assert f"MGPU_DDP_FOLDER={word}\n" in (tmp_path / "srun.env").read_text()
        monkeypatch.setenv("MGPU_DDP_FOLDER", word)
        assert check_command(words[-1:]).folder == str(Path(word).absolute())


@pytest.mark.parametrize("name", ["PROCESSES", "SLURM_JOB_ID", "SHARDS"])
@pytest.mark.parametrize("word", HOSTILE)
def test_what_must_be_a_number_is_one(name: str, word: str, tmp_path: Path) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MAX": "7"}
    done, words = started(tmp_path, "slurm_array.sbatch", **{**array, name: word})
    assert done.returncode == 2
    assert words == []
    assert f"mgpu_ddp: {name} must be a number" in done.stderr


def test_an_allocation_without_nodes_is_refused(tmp_path: Path) -> None:
    done, words = started(tmp_path, "slurm.sbatch", SLURM_JOB_NODELIST="")
    assert (done.returncode, words) == (2, [])
    assert done.stderr == "mgpu_ddp: the allocation must have nodes, got ''. Ask for --nodes=1 or more.\n"


def test_an_interpreter_without_the_package_is_refused_and_no_other_taken(tmp_path: Path) -> None:
    done, words = started(tmp_path, "slurm.sbatch", PYTHON="/bin/false")
    assert (done.returncode, words) == (2, [])
    assert done.stderr.startswith("mgpu_ddp: mgpu_ddp is not installed for /bin/false. ")


def test_the_scripts_are_clean() -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        assert "MGPU_DDP_REQUIRE_SLURM" not in os.environ
        pytest.skip("needs shellcheck")
    scripts = sorted(str(path) for path in LAUNCH.iterdir())
    subprocess.run([shellcheck, "-x", *scripts], cwd=LAUNCH.parent, check=True, timeout=60)
