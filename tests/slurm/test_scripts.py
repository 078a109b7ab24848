"""The batch scripts, word by word: what is typed reaches mgpu_ddp as it is, and no shell interprets it."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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


COMMANDS = f"""
srun() {{ printf "%s\\0" "$@" > ../srun; env | grep -E "^(SRUN|OMP|TORCH|MGPU)_" | sort > ../environ; }}
scontrol() {{
    case "$2" in
    hostnames) [ -z "$3" ] || printf "a1\\na2\\n" ;;
    job) echo "JobId=123 Command={LAUNCH}/slurm.sbatch WorkDir=/x" ;;
    esac
}}
python3() {{ :; }}
"""
"""SLURM's commands, which only write down what they were asked."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """How a script is started, or was."""

    arguments: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    code: int = 0
    err: str = ""
    words: Sequence[str] = ()
    """Arguments of srun."""
    seen: str = ""
    """The part of the environment that srun passes on for us."""


def start_all(tmp_path: Path, script: str, starts: Sequence[Start]) -> list[Start]:
    """Start a script in each way, all in one bash, and return what became of each."""
    lines = [COMMANDS]
    for number, start in enumerate(starts):
        (tmp_path / str(number) / "work").mkdir(parents=True)
        exports = [shlex.join(["export", f"{name}={value}"]) for name, value in start.environ.items()]
        source = shlex.join(["source", str(LAUNCH / script), *start.arguments])
        lines.append(f"({'; '.join([f'cd {number}/work', *exports, source])}) > {number}/out 2> {number}/err")
        lines.append(f"echo $? > {number}/code")
    environ = {"PATH": "/usr/bin:/bin", "HOME": os.environ.get("HOME", "/")} | HERE
    subprocess.run(["bash", "-c", "\n".join(lines)], cwd=tmp_path, env=environ, check=True, timeout=120)
    assert not list(tmp_path.glob("*/work/*")), "nothing but srun was to do anything"
    return [_read(tmp_path / str(number), start) for number, start in enumerate(starts)]


def _read(folder: Path, start: Start) -> Start:
    words = (folder / "srun").read_text().split("\0")[:-1] if (folder / "srun").exists() else []
    seen = (folder / "environ").read_text() if words else ""
    code = int((folder / "code").read_text())
    return replace(start, code=code, err=(folder / "err").read_text(), words=words, seen=seen)


def start(tmp_path: Path, script: str, *arguments: str, **environ: str) -> Start:
    return start_all(tmp_path, script, [Start(arguments=arguments, environ=environ)])[0]


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
            "SCRIPT": "it's mine.py",
        },
    ),
    "sweep": ("slurm_sweep.sbatch", ["+sweep=batch_size"], {"SLURM_GPUS_ON_NODE": "8"}),
}


@pytest.mark.parametrize("case", CASES)
def test_srun_is_given_what_the_allocation_asks_for(case: str, tmp_path: Path) -> None:
    script, arguments, environ = CASES[case]
    started = start(tmp_path, script, *arguments, **environ)
    # The recorder leaves no run folder, so no job was complete.
    assert started.code == 1, started.err
    text = "\n".join([*started.words, "--", started.seen])
    assert_golden(f"{case}.txt", text.replace(str(LAUNCH), "LAUNCH"))


def test_what_is_typed_reaches_the_command_as_it_is(tmp_path: Path) -> None:
    starts = [Start(), *(Start(arguments=(word, f"data.root={word}")) for word in HOSTILE)]
    plain, *typed = start_all(tmp_path, "slurm.sbatch", starts)
    assert plain.code == 1
    for word, started in zip(HOSTILE, typed, strict=True):
        assert started.words == [*plain.words, word, f"data.root={word}"]


def test_a_run_folder_of_any_name_reaches_the_command_as_it_is(
    tmp_path: Path, registered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [word for word in HOSTILE if "\n" not in word]
    plain, *named = start_all(tmp_path, "slurm.sbatch", [Start(), *(Start(environ={"RUN_DIR": n}) for n in names)])
    for name, started in zip(names, named, strict=True):
        assert started.words == plain.words
        assert f"MGPU_DDP_FOLDER={name}\n" in started.seen
    for name in ("a b", "☃", "=", ",", "'", '"', "{a,b}", "${IFS}touch marker"):
        monkeypatch.setenv("MGPU_DDP_FOLDER", name)
        assert check_command(plain.words[-1:]).folder == str(Path(name).absolute())


def test_the_folder_that_a_command_names_is_read_as_the_command_reads_it(
    tmp_path: Path, registered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    typed = ["it's", "'a b'", '"a, b"', "~/my runs", "~", "x~/y", "a=b", "{x}"]
    named = start_all(tmp_path, "slurm.sbatch", [Start(arguments=(f"++output.dir={text}",)) for text in typed])
    for text, started in zip(typed, named, strict=True):
        (seen,) = (line for line in started.seen.splitlines() if line.startswith("MGPU_DDP_FOLDER="))
        assert str(Path(seen.partition("=")[2]).absolute()) == check_command([f"output.dir={text}"]).folder


def test_the_command_that_continues_has_what_was_typed_word_by_word(tmp_path: Path) -> None:
    words = [word for word in HOSTILE if "\n" not in word]
    (started,) = start_all(
        tmp_path, "slurm.sbatch", [Start(arguments=tuple(words), environ={"SCRIPT": "it's mine.py"})]
    )
    (seen,) = (line for line in started.seen.splitlines() if line.startswith("MGPU_DDP_COMMAND="))
    expected = ["env", "SCRIPT=it's mine.py", "sbatch", "--nodes=2", str(LAUNCH / "slurm.sbatch"), *words]
    assert shlex.split(seen.partition("=")[2]) == expected


@pytest.mark.parametrize("name", ["PROCESSES", "SLURM_JOB_ID", "SHARDS"])
def test_what_must_be_a_number_is_one(name: str, tmp_path: Path) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MAX": "7"}
    starts = [Start(environ=array | {name: word}) for word in HOSTILE]
    for word, started in zip(HOSTILE, start_all(tmp_path, "slurm_array.sbatch", starts), strict=True):
        assert (started.code, started.words) == (2, []), word
        assert f"mgpu_ddp: {name} must be a number" in started.err


def test_an_allocation_without_nodes_is_refused(tmp_path: Path) -> None:
    started = start(tmp_path, "slurm.sbatch", SLURM_JOB_NODELIST="")
    assert (started.code, started.words) == (2, [])
    assert started.err == "mgpu_ddp: the allocation must have nodes, got ''. Ask for --nodes=1 or more.\n"


def test_an_interpreter_without_the_package_is_refused_and_no_other_taken(tmp_path: Path) -> None:
    started = start(tmp_path, "slurm.sbatch", PYTHON="/bin/false")
    assert (started.code, started.words) == (2, [])
    assert started.err.startswith("mgpu_ddp: mgpu_ddp is not installed for /bin/false. ")


def test_the_scripts_are_clean() -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        assert "MGPU_DDP_REQUIRE_SLURM" not in os.environ
        pytest.skip("needs shellcheck")
    scripts = sorted(str(path) for path in LAUNCH.iterdir())
    subprocess.run([shellcheck, "-x", *scripts], cwd=LAUNCH.parent, check=True, timeout=60)
