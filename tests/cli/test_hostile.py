"""Hostile command lines, through to Hydra itself: no code runs, nothing is made, and one line says why, in time."""

import os
from pathlib import Path

import pytest

from tests.support.runs import assert_proved
from tests.support.starting import SMALL, ranks, run

MARKER = "marker"
TIME_S = 10
"""Far above what a refusal takes, on a busy machine as well."""


def hydra_calls(folder: Path) -> str:
    """Words that make Hydra run a file of this folder, without a word that a filter of words would know."""
    hub = folder / "hub"
    hub.mkdir()
    (hub / "hubconf.py").write_text(f"open({str(folder / MARKER)!r}, 'w')\n")
    target = f"{{_target_: torch.hub.load, repo_or_dir: {hub}, model: evil, source: local}}"
    return f"# @package _global_\ndata: {{name: fake, size: 4}}\nhydra: {{callbacks: {{x: {target}}}}}\n"


def log_handler(folder: Path, handler: str) -> str:
    """Words that make Hydra's own log import code or open a file."""
    handlers = f"{{h: {handler}}}".replace("MARKER", str(folder / MARKER))
    logging = f"hydra: {{hydra_logging: {{version: 1, handlers: {handlers}, root: {{handlers: [h]}}}}}}"
    return f"# @package _global_\ndata: {{name: fake, size: 4}}\n{logging}\n"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A working directory with a config folder `c`, in which everything is hostile, and more of it beside."""
    evil = hydra_calls(tmp_path)
    for group in ("data", "model", "transform"):
        folder = tmp_path / "c" / group
        folder.mkdir(parents=True)
        (folder / ".yaml").write_text(evil)
        (folder / "evil.yaml").write_text(evil)
    (tmp_path / "evil.yaml").write_text(evil)
    (tmp_path / "c" / "data" / "deep").mkdir()
    (tmp_path / "c" / "data" / "deep" / "evil.yaml").write_text(evil)
    file, code = "{class: logging.FileHandler, filename: MARKER}", "{(): os.mkdir, path: MARKER}"
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
        for before, name in zip("abcdefghi", "bcdefghij", strict=True)
    )
    texts = {
        "dot": "defaults: [.yaml]\n",
        "dot_of_group": "defaults: [/data/.yaml]\n",
        "out": "defaults: [../../evil]\n",
        "out_of_group": "defaults: [{/data: ../../evil}]\n",
        "out_optional": "defaults: [fake, optional ../../evil]\n",
        "anywhere": f"defaults: [/{tmp_path}/evil]\n",
        "callbacks": "defaults: [fake, {override /hydra/callbacks: evil}]\n",
        "environment": "defaults: ['${oc.env:EVIL}']\n",
        "file": log_handler(tmp_path, file),
        "code": log_handler(tmp_path, code),
        "bomb": bomb,
        "merge_bomb": "defaults: [fake]\na: &a {x: 1}\nb: &b {<<: [*a, *a]}\nc: {<<: [*b, *b]}\n",
        "nested": f"defaults: [fake]\nsize: {'[' * 20000}\n",
        "resolvers": f"defaults: [fake]\nsize: {'${oc.env:' * 3000}x{'}' * 3000}\n",
        "itself": "defaults: [itself]\n",
        "loop": "defaults: [fake, pool]\n",
        "pool": "defaults: [loop]\n",
        "doubling": "defaults: [fake, double0, double0]\n",
        **{f"double{n}": f"defaults: [double{n + 1}, double{n + 1}]\n" for n in range(40)},
        "double40": "size: 4\n",
        "tag": "defaults: [fake]\nsize: !!python/object/apply:os.mkdir [marker]\n",
    }
    for name, text in texts.items():
        (tmp_path / "c" / "data" / f"{name}.yaml").write_text(text)
    (tmp_path / "c" / "data" / "large.yaml").touch()
    os.truncate(tmp_path / "c" / "data" / "large.yaml", 2**34)
    os.mkfifo(tmp_path / "c" / "data" / "fifo.yaml")
    for name, target in {"zero": "/dev/zero", "outside": "../../evil.yaml", "loop_link": "loop_link.yaml"}.items():
        (tmp_path / "c" / "data" / f"{name}.yaml").symlink_to(target)
    for name in ("here", "there"):
        (tmp_path / "c" / name).symlink_to(".")
    hydra = tmp_path / "c" / "hydra" / "callbacks"
    hydra.mkdir(parents=True)
    (hydra / "evil.yaml").write_text(evil.splitlines()[-1].removeprefix("hydra: {callbacks: ").removesuffix("}"))
    return tmp_path


OPTIONS = [
    *("evil", ".yaml", "..", "", "../../evil", "../../evil.yaml", "deep/evil", "./evil", "//evil", "evil.yaml"),
    *("dot", "dot_of_group", "out", "out_of_group", "out_optional", "anywhere", "callbacks", "environment"),
    *("file", "code", "bomb", "merge_bomb", "nested", "resolvers", "itself", "loop", "doubling", "large", "tag"),
    *("fifo", "zero", "outside", "loop_link", "'${oc.env:EVIL}'", "[evil]", "{evil: 1}", "null"),
]
FLAGS = [[], ["--help"], ["--hydra-help"], ["--info"], ["--info", "defaults-tree"], ["--cfg", "all"], ["--cfg", "job"]]
DECODED = "'${oc.decode:${oc.env:EVIL}}'"
LINES = {
    **{f"option {option}": ["-cd", "c", f"data={option}"] for option in OPTIONS},
    **{
        f"{group}={name}": ["-cd", "c", f"{group}={name}"]
        for group in ("model", "transform")
        for name in ("evil", ".yaml")
    },
    **{f"{' '.join(flag)} evil": [*flag, "-cd", "c", "data=evil"] for flag in FLAGS},
    "help that logs to a file": ["--help", "--config-dir=c", "data=file"],
    "help that logs by code": ["--help", "-cd", "c", "data=code"],
    "last of two folders": ["-cd", "elsewhere", "--config-dir", "c", "data=evil"],
    "twice chosen": ["-cd", "c", "data=evil", "data=fake"],
    "swept": ["-m", "-cd", "c", "data=fake,evil"],
    "swept late": ["-m", "-cd", "c", f"data={','.join(['fake'] * 200)},../../evil"],
    "swept by pattern": ["-m", "-cd", "c", "data=glob(*)"],
    "hydra's group": ["-cd", "c", "+hydra/callbacks=evil"],
    "hydra's search path": ["hydra.searchpath=[file://c]", "data=evil"],
    "completion for no shell": ["-sc", "install=evil"],
    **{
        " and ".join(two): [*two]
        for two in (("--run", "-m"), ("-m", "--cfg=job"), ("-i", "-r"), ("-c=job", "-sc=query=bash"))
    },
    "nothing to resolve": ["--resolve", "--info"],
    "a billion jobs": ["-m", "seed=range(0,1000000000)"],
    "a billion, shuffled": ["-m", "seed=shuffle(range(0,1000000000))"],
    "a billion, by another sweeper": ["-m", "hydra/sweeper=optuna", "seed=shuffle(range(0,1000000000))"],
    "a billion trials": ["-m", "hydra/sweeper=optuna", "seed=range(9)", "hydra.sweeper.n_trials=1000000000"],
    "a billion on a grid": ["-m", "hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "seed=range(1000000000)"],
    "a product": ["-m", "seed=range(1000)", "batch_size=range(1,1000)", "limit=range(1000)"],
    "rounds": ["-m", "seed=range(1000)", "sweep.repeats=1000"],
    "no end": ["-m", "seed=range(0,inf)"],
    "no steps": ["-m", "seed=range(0,9,0)"],
    "tiny steps": ["-m", "loader.timeout_s=range(1,2,1e-300)"],
    "no number": ["-m", "seed=range(0,nan)"],
    "options by the billion": ["-m", "data=range(1000000000)"],
    "a range in a list": ["-m", "seed=range(0,1000000000),3"],
    "deep list": [f"data.image_size={'[' * 5000}{']' * 5000}"],
    "deep list, brackets quoted": [f"""data.image_size={"[']'," * 2000}{"]" * 2000}"""],
    "deep dict": [f"runtime={'{a:' * 5000}1{'}' * 5000}"],
    "deep key of Hydra": [f"hydra.verbose={'[' * 500}{']' * 500}"],
    "deep resolvers": [f"model.name='{'${oc.env:x,' * 2000}y{'}' * 2000}'"],
    "deep calls": [f"seed={'int(' * 3000}1{')' * 3000}"],
    "deep decoded": ["model.name=" + "'${oc.decode:${oc.env:DEEP}}'"],
    "wide list": [f"output.fields=[{','.join(['topk'] * 15000)}]"],
    "many digits": [f"seed={'9' * 5000}"],
    "folder that is itself": ["hydra.run.dir='${hydra.run.dir}'"],
    "folder decoded": ["hydra.run.dir='${oc.decode:${oc.env:DEEP}}'"],
    "sweep folder of nothing": ["-m", "seed=1,2", "hydra.sweep.dir='${nowhere}'"],
    **{f"decoded {key}": [f"{key}={DECODED}"] for key in ("hydra.callbacks", "hydra.job_logging", "data", "runtime")},
    "decoded launcher": ["-m", "seed=1,2", f"hydra/launcher={DECODED}"],
}


def made_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.name not in ("stdout.txt", "stderr.txt"))


@pytest.mark.parametrize("name", LINES)
def test_a_hostile_line_is_refused_in_one_line_and_does_nothing(
    name: str, hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVIL", "../../evil")
    monkeypatch.setenv("DEEP", "[" * 5000)
    before = made_in(hostile)
    ended = run(ranks(1, *LINES[name]), hostile)
    assert made_in(hostile) == before
    assert ended.code == 2, ended.err
    assert ended.err.startswith("mgpu_ddp: ")
    assert len(ended.err.splitlines()) == 1
    assert ended.seconds < TIME_S


# Hydra's own help takes no options of a job.
@pytest.mark.parametrize("flag", [flag for flag in FLAGS[1:] if flag != ["--hydra-help"]], ids=" ".join)
def test_asking_reads_no_more_of_a_hostile_folder_than_what_is_named(flag: list[str], hostile: Path) -> None:
    (hostile / "c" / "transform" / "small.yaml").write_text("defaults: [plain]\nsize: 8\n")
    before = made_in(hostile)
    ended = run(ranks(1, *flag, "-cd", "c", "transform=small"), hostile)
    assert ended.code == 0, ended.err
    assert made_in(hostile) == before
    if flag == ["--cfg", "job"]:
        assert "transform:\n  name: plain\n  size: 8\n" in ended.out
    elif flag == ["--info", "defaults-tree"]:
        assert "transform: small" in ended.out
    assert f"{hostile}/c" not in ended.out, "Hydra is not told of the folder"


def write_options(tmp_path: Path) -> list[str]:
    folder = tmp_path / "mine" / "data"
    folder.mkdir(parents=True)
    (folder / "few.yaml").write_text("defaults: [fake]\nsize: 9\nimage_size: [3, 32, 32]\n")
    (folder / "fewer.yaml").write_text("defaults: [few]\nsize: 5\n")
    return [word for word in SMALL if not word.startswith("data.")]


def test_options_of_the_users_own_make_jobs_and_sweeps(tmp_path: Path) -> None:
    small = write_options(tmp_path)
    ended = run(ranks(2, *small, "--config-dir", "mine", "data=few", "output.dir=out"), tmp_path)
    assert ended.code == 0, ended.err
    assert_proved(tmp_path / "out", 9)
    sweep = ("--multirun", "hydra.sweep.dir=sweep", "data=glob(few*)")
    ended = run(ranks(2, *small, "--config-dir", "mine", *sweep), tmp_path)
    assert ended.code == 0, ended.err
    assert_proved(tmp_path / "sweep" / "0", 9)
    assert_proved(tmp_path / "sweep" / "1", 5)


@pytest.mark.slow
def test_jobs_of_a_sweep_that_start_apart_have_the_options_too(tmp_path: Path) -> None:
    small = write_options(tmp_path)
    apart = ("hydra/launcher=torchrun", "hydra.launcher.nproc_per_node=1", "--multirun", "hydra.sweep.dir=sweep")
    ended = run(ranks(1, *small, "--config-dir", "mine", *apart, "data=few"), tmp_path)
    assert ended.code == 0, ended.err
    assert_proved(tmp_path / "sweep" / "0", 9)
