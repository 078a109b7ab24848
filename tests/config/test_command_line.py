"""The command line: what is accepted, how a mistake is told, and that nothing on it can run code.

Hydra acts on what this check lets through, so a hostile line must be refused here, before Hydra starts.
"""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from mgpu_ddp.config.allowlist import parse
from mgpu_ddp.config.command_line import Command, check_command
from mgpu_ddp.config.compose import compose_config, quote
from mgpu_ddp.config.overrides import MAX_CHECKED, PLUGINS
from mgpu_ddp.errors import UsageError

pytestmark = pytest.mark.usefixtures("registered")

MARKER = "marker"
"""The file in the working directory that hostile lines try to make."""


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(*argv: str) -> str:
    """The one line a command is refused with; nothing is made on disk."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(UsageError) as raised:
        check_command(argv)
    assert sorted(Path().rglob("*")) == before
    text = str(raised.value)
    assert len(text.splitlines()) == 1
    return text


@pytest.mark.parametrize(
    ("argv", "multirun"),
    [
        ([], False),
        (["batch_size=8", "data.size=97", "output.dir=out"], False),
        (["data=folder", "data.root=/images"], False),
        (["model.name=squeezenet1_1", "model.weights=DEFAULT", "transform=imagenet", "transform.size=64"], False),
        (["data.image_size=[1,8,8]", "output.fields=[topk,logits]", "max_errors=0.5", "shard=1/4"], False),
        (["hydra.run.dir=here", "hydra.job.name=x", "hydra/launcher=basic"], False),
        (["++batch_size=8", "loader.workers=2", "output.dir=null"], False),
        (["-m", "batch_size=8,16"], True),
        (["--multirun", "seed=range(3)", "hydra.sweep.dir=there"], True),
    ],
)
def test_good_lines_pass(argv: list[str], multirun: bool) -> None:
    command = check_command(argv)
    assert (command.informational, command.multirun) == (False, multirun)
    assert Path(command.folder).is_absolute()
    assert not list(Path().iterdir()), "checking makes nothing"


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--cfg", "job"], ["-c=job"], ["--info"], ["--hydra-help"]])
def test_asking_for_information_starts_no_job(argv: list[str]) -> None:
    for words in ([], ["batch_size=4"]):
        command = check_command([*argv, *words])
        assert (command.informational, command.folder) == (True, "")
        assert command.argv[-len(words) :] == words or not words


def test_the_folder_is_the_one_asked_for_or_a_fresh_one() -> None:
    here = Path().absolute()
    assert check_command(["output.dir=out"]).folder == str(here / "out")
    assert check_command(["hydra.run.dir=run"]).folder == str(here / "run")
    first, second = check_command([]).folder, check_command([]).folder
    assert first != second, "two starts within one second"
    assert first.startswith(str(here / "outputs"))
    assert check_command(["-m", "seed=1,2"]).folder.startswith(str(here / "multirun"))


@pytest.mark.parametrize(
    "name",
    ["plain", "it's", 'a"b', "a,b=c", "{x}", "[x]", "${x}", "$HOME", "back\\slash", "end\\", "\\'", "\\${x}", "snow ☃"],
)
def test_any_text_survives_hydras_grammar_and_omegaconfs(name: str) -> None:
    (override,) = parse([f"output.dir={quote(name)}"])
    assert OmegaConf.create({"dir": override.value()}).dir == name


@pytest.mark.parametrize("multirun", [False, True])
def test_any_folder_reaches_hydra_as_it_is(multirun: bool) -> None:
    folder = str(Path('it\'s a "${x}", {b}=☃\\').absolute())
    hydra = compose_config(Command(words=["seed=1"], multirun=multirun, folder=folder).argv).hydra
    assert (hydra.sweep.dir if multirun else hydra.run.dir) == folder


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("batchsize=4", "batchsize must be a known key, got 'batchsize=4'. Did you mean batch_size?"),
        ("+batchsize=4", "batchsize must be a known key, got '+batchsize=4'. Did you mean batch_size?"),
        ("output.formt=csv", "output.formt must be a known key, got 'output.formt=csv'. Did you mean output.format?"),
        ("xyzzy=1", "xyzzy must be a known key, got 'xyzzy=1'. --help lists every key."),
        (
            "data.root=/x",
            "data.root must belong to the chosen data, got 'data.root=/x'. Add data=folder or list, or leave it out.",
        ),
        ("batch_size=many", "batch_size must be at least 1 or auto, got 'many'"),
        ("batch_size=1.5", "batch_size must be an integer or text, got '1.5'"),
        ("data.size=1.5", "data.size must be an integer, got '1.5'"),
        ("resume=perhaps", "resume must be true or false, got 'perhaps'"),
        ("resume=3", "resume must be true or false, got '3'"),
        ("runtime={fold:7}", "runtime.fold must be true or false, got '{fold:7}'"),
        (
            "runtime={precison:fp16}",
            "runtime.precison must be a known key, got 'runtime={precison:fp16}'. Did you mean",
        ),
        ("runtime=${output}", "runtime must be a group of keys, got '${output}'"),
        ("data.image_size=3", "data.image_size must be a list of integers, got '3'"),
        ("output=csv", "output must be a group of keys, got 'csv'"),
        ("data=imagefolder", "data must be one of fake, folder, list, webdataset, parquet, array, got 'imagefolder'"),
        ("transform=crop", "transform must be one of auto, plain, imagenet, got 'crop'"),
        ("model=exported", "got 'exported'. To load an exported program is to run code that its file holds"),
        (
            "model=resnet50",
            "got 'resnet50'. Choose it by model.name=resnet50; timm's models also take model=timm.",
        ),
        ("model=mine.py", "got 'mine.py'. Start it as a script that calls mgpu_ddp.main: mgpu-infer mine.py (docs/own"),
        ("model=net.pt", ", got 'net.pt'. Give it as model.weights=net.pt."),
        ("batch_size=-4", "batch_size must be at least 1 or auto, got -4"),
        (
            "data=${oc.env:HOME}",
            "data must be one of fake, folder, list, webdataset, parquet, array, got '${oc.env:HOME}'",
        ),
        ("+data=folder", "data must be chosen without +, got '+data=folder'. Write data=folder."),
        ("data=folder", "data.root must be given, got nothing"),
        ("data.size=${oc.env:NOWHERE}", "data.size must resolve to its type, got: "),
        ("+seed=4", "Hydra refuses the configuration: Could not append to config. An item is already at 'seed'."),
        ("hydra.job.name=[1]", "Hydra refuses the configuration: Error merging override hydra.job.name=[1]: "),
        ("hydra.launcher.nodes=2", "hydra.launcher.nodes must be given with hydra/launcher=slurm, got"),
        ("hydra/sweeper/sampler=tpe", "hydra/sweeper/sampler must be given with hydra/sweeper=optuna, got"),
        ("model=timm", "model.name must be given, got nothing"),
        ("batch_size=4,8", "batch_size must be one value, got 'batch_size=4,8'. Add --multirun"),
        ("batch_size", "override must be key=value in Hydra's grammar, got 'batch_size'"),
        ("model.name={", "override must be key=value in Hydra's grammar, got 'model.name={'"),
        ("model.name=~/photos", "got 'model.name=~/photos'. Quote values that hold , = ~ or braces"),
        (
            "output.dir=${nowhere}/x",
            "Hydra refuses the configuration: Interpolation key 'nowhere' not found. See --help.",
        ),
        ("=4", "override must be key=value"),
        ("", "override must be key=value"),
        ("batch_size=a\nb", "batch_size=a\\nb"),
        ("~batch_size", "batch_size must be there, got '~batch_size'"),
        ("~data", "data must be there, got '~data'"),
        ("--batch_size=4", "option must be one of Hydra's safe flags, got '--batch_size=4'"),
        ("--nproc_per_node=2", "option must be one of Hydra's safe flags"),
        ("--config-dir=missing", "--config-dir must be a folder, got 'missing'"),
    ],
)
def test_a_mistake_is_one_line_that_helps(word: str, expected: str) -> None:
    assert expected in refused(word)


def test_a_sweeper_that_is_not_installed_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLUGINS, "optuna", "hydra_absent_sweeper")
    line = "hydra/sweeper must be installed, got 'optuna'. Install its plugin (pip install hydra-absent-sweeper)."
    assert refused("-m", "hydra/sweeper=optuna", "seed=1,2") == line


@pytest.mark.parametrize(
    "word",
    [
        "resume=0",
        "resume=yes",
        "runtime={fold:false,precision:bf16}",
        "loader.timeout_s=5",
        "model.name=5",
        "limit=null",
    ],
)
def test_values_that_omegaconf_converts_pass(word: str) -> None:
    check_command([word])


TARGET = "{_target_:os.system,command:touch marker}"
HANDLER = "{version:1,handlers:{h:{class:logging.FileHandler,filename:marker}},root:{handlers:[h]}}"

HOSTILE = [
    # Hydra instantiates callbacks before the job's own code runs.
    "hydra.callbacks.x._target_=os.system",
    "+hydra.callbacks.x._target_=os.system",
    "++hydra.callbacks.x._target_=os.system",
    f"+hydra.callbacks.x={TARGET}",
    f"hydra.callbacks={{x:{TARGET}}}",
    "+hydra.callbacks.x={}",
    "hydra/callbacks=evil",
    "+hydra/callbacks=evil",
    "+hydra/callbacks@hydra.callbacks=evil",
    "hydra.callbacks=${oc.decode:${oc.env:EVIL}}",
    "~hydra.callbacks",
    "+data@hydra.callbacks.x=fake",
    f"hydra={{callbacks:{{x:{TARGET}}}}}",
    f"++hydra={{callbacks:{{x:{TARGET}}}}}",
    # Launchers and sweepers are chosen by _target_.
    "hydra/launcher=evil",
    "hydra/launcher=submitit_local",
    "hydra/launcher=[basic,evil]",
    "+hydra/launcher=joblib",
    "hydra/sweeper=ax",
    "hydra.sweeper.custom_search_space=os.system",
    "hydra.sweeper.storage=sqlite:///x.db",
    "hydra/sweeper/sampler=cmaes",
    "hydra.sweeper.sampler._target_=os.system",
    "hydra.launcher.kind=slurm",
    "hydra/sweeper=[evil]",
    "hydra.launcher._target_=os.system",
    "+hydra.launcher._target_=os.system",
    "hydra.sweeper._target_=os.system",
    f"hydra.launcher={TARGET}",
    f"++hydra.sweeper={TARGET}",
    "hydra.launcher=${oc.decode:${oc.env:EVIL}}",
    "hydra.sweeper=${oc.decode:${oc.env:EVIL}}",
    "+hydra@hydra.launcher=evil",
    # The sweeper reads its parameters as further overrides.
    "++hydra.sweeper={params:{+hydra.callbacks.x:'{}'}}",
    f"++hydra.sweeper={{params:{{++hydra.job_logging:'{HANDLER}'}}}}",
    "++hydra.sweeper.params={+hydra.job.env_set.PATH:evil}",
    # Log configuration imports classes and opens files.
    "hydra/job_logging=default",
    "hydra/job_logging=evil",
    "+hydra/hydra_logging=evil",
    f"hydra.job_logging={HANDLER}",
    f"++hydra.hydra_logging={HANDLER}",
    "+hydra.job_logging.handlers.x.class=os.system",
    "hydra.job_logging.root=${oc.decode:${oc.env:EVIL}}",
    # More configuration from elsewhere, and the environment of the job.
    "hydra.searchpath=[file:///tmp]",
    "+hydra.searchpath=[pkg://evil]",
    "hydra.job.env_set.LD_PRELOAD=evil.so",
    "+hydra.job.env_set={PYTHONPATH:evil}",
    "++hydra.job={env_set:{PYTHONPATH:evil}}",
    "hydra.job.env_set=${oc.decode:${oc.env:EVIL}}",
    # Code named in the job's own keys.
    "+_target_=os.system",
    "model._target_=os.system",
    "+model._target_=os.system",
    f"model={TARGET}",
    f"+data.transform={TARGET}",
    f"output.fields=[{TARGET}]",
    f"data.image_size=[[{TARGET}]]",
    f"++runtime={TARGET}",
    # Plugins go by the name under which they are installed.
    "model=evil:build",
    "model=plugin/evil",
    "+model.builder=evil:build",
    "model={name:evil,builder:evil.build}",
    f"data.carry=[{TARGET}]",
    "data@_global_=evil",
    "+data@extra=fake",
    "model@data=resnet18",
    "data.root='_target_'",
    f"hydra.verbose={TARGET}",
    # Options that unpickle, or that take the configuration from elsewhere; argparse accepts every abbreviation.
    "--experimental-rerun=evil/config.pickle",
    "--experimental-rerun",
    "--experimental-r=evil/config.pickle",
    "--experimental=evil/config.pickle",
    "--exp=evil/config.pickle",
    "--e=evil/config.pickle",
    "--config-path=evil",
    "--config-p=evil",
    "-cp=evil",
    "-cpevil",
    "--config-name=evil",
    "--config-n=evil",
    "-cn=evil",
    "--config-di=evil",
    "--config=evil",
    "--mult",
    "--",
    "@evil",
]


@pytest.mark.parametrize("multirun", [False, True], ids=["run", "multirun"])
@pytest.mark.parametrize("word", HOSTILE)
def test_hostile_words_are_refused(word: str, multirun: bool, evil: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVIL", "{x:" + TARGET + "}")
    refused(*(["--multirun"] if multirun else []), word)
    assert not Path(MARKER).exists()


def test_a_key_that_takes_any_value_cannot_name_code() -> None:
    # Hydra makes the sweeper, and whatever names a target among its values.
    line = refused("--multirun", "hydra/sweeper=optuna", f"hydra.sweeper.direction={TARGET}")
    assert "hydra.sweeper.direction must be free of _target_" in line
    assert not Path(MARKER).exists()


class TouchMarker:
    """The content of a hostile pickle."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {MARKER}",)


EVIL_FILES = {
    "transform/target.yaml": "_target_: os.system\ncommand: touch marker\n",
    "transform/nested.yaml": "name: plain\nsize: {deep: [{_target_: os.system}]}\n",
    "transform/callback.yaml": "callbacks: {x: {_target_: os.system, command: touch marker}}\n",
    "transform/no_target.yaml": "callbacks: {x: {}}\n",
    "transform/logging.yaml": (
        "job_logging: {handlers: {h: {class: logging.FileHandler, filename: marker}}, root: {handlers: [h]}}\n"
    ),
    "transform/hydra_logging.yaml": (
        "hydra_logging: {handlers: {h: {class: logging.FileHandler, filename: marker}}, root: {handlers: [h]}}\n"
    ),
    "transform/launcher.yaml": "launcher: {_target_: os.system}\n",
    "transform/environment.yaml": "job: {env_set: {PYTHONPATH: evil}}\n",
    "transform/searchpath.yaml": "searchpath: [file:///tmp]\n",
    "transform/parameters.yaml": "sweeper: {params: {+hydra.callbacks.x: '{}'}}\n",
    "transform/defaults.yaml": "",
    "hydra/callbacks/evil.yaml": "x: {_target_: os.system, command: touch marker}\n",
    "hydra/launcher/evil.yaml": "_target_: os.system\n",
    "hydra/job_logging/evil.yaml": "version: 1\nroot: {handlers: []}\n",
}
AS_IT_IS = ("target", "nested")


def write_hostile(root: Path, *names: str) -> None:
    """Write some of the hostile files, so that each is refused for what it says itself."""
    for name in names:
        path, text = root / name, EVIL_FILES[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.startswith("transform/") and path.stem not in AS_IT_IS:
            body = "".join(f"  {line}\n" for line in text.splitlines())
            defaults = "defaults:\n  - override /hydra/callbacks: evil\n" if path.stem == "defaults" else ""
            hydra = f"hydra:\n{body}" if body else ""
            text = f"# @package _global_\n{defaults}transform: {{name: auto, size: 224}}\n{hydra}"
        path.write_text(text)


@pytest.fixture
def evil(empty_folder: Path) -> Path:
    """A folder for --config-dir and --experimental-rerun in which everything is hostile."""
    root = empty_folder / "evil"
    write_hostile(root, *EVIL_FILES)
    for name in ("config", "hydra"):
        (root / f"{name}.pickle").write_bytes(pickle.dumps(TouchMarker()))
    return root


def write_harmless(root: Path) -> None:
    """A config folder that adds the option transform=small."""
    (root / "transform").mkdir(parents=True)
    (root / "transform/small.yaml").write_text("defaults: [plain]\nsize: 8\n")


OPTIONS = [p.stem for p in map(Path, EVIL_FILES) if p.parent.name == "transform"]


@pytest.mark.parametrize("flag", [["--config-dir", "evil"], ["--config-dir=evil", "-m"], ["-cd", "evil", "-c=job"]])
@pytest.mark.parametrize("option", OPTIONS)
def test_files_of_a_config_dir_cannot_name_code(option: str, flag: list[str]) -> None:
    write_hostile(Path("evil"), f"transform/{option}.yaml")
    if option == "defaults":
        write_hostile(Path("evil"), "hydra/callbacks/evil.yaml")
    refused(*flag, f"transform={option}")
    assert not Path(MARKER).exists()


@pytest.mark.parametrize("option", OPTIONS)
def test_files_of_a_config_dir_cannot_hide_in_a_sweep(option: str) -> None:
    write_hostile(Path("evil"), f"transform/{option}.yaml")
    for swept in (f"auto,{option}", f"choice(auto,{option})", "glob(*)"):
        refused("-m", "-cd", "evil", f"transform={swept}")


@pytest.mark.parametrize("option", ["callback", "logging"])
def test_files_of_a_config_dir_cannot_hide_behind_a_link(option: str) -> None:
    """Hydra follows linked folders and files; Path.rglob passes over linked folders."""
    write_hostile(Path("evil"), f"transform/{option}.yaml")
    write_harmless(Path("linked"))
    Path("linked/transform/file.yaml").symlink_to(f"../../evil/transform/{option}.yaml")
    refused("-cd", "linked", "transform=file")
    Path("linked/transform/file.yaml").unlink()
    Path("folder").mkdir()
    Path("folder/transform").symlink_to("../evil/transform", target_is_directory=True)
    refused("-cd", "folder", f"transform={option}")
    Path("whole").symlink_to("evil", target_is_directory=True)
    refused("-cd", "whole", f"transform={option}")


@pytest.mark.parametrize(
    "default",
    [
        "../../evil/transform/callback",
        "/../evil/transform/callback",
        "/EVIL/transform/callback",
        "optional ../../evil/transform/callback",
        "/transform: ../../evil/transform/callback",
        "/transform: [auto, ../../evil/transform/callback]",
        "/: EVIL/transform/callback",
        "/../evil/transform: callback",
        "override /transform: ../../evil/transform/callback",
        "'${oc.env:ELSEWHERE}'",
        "/transform: '${oc.env:ELSEWHERE}'",
    ],
)
def test_files_of_a_config_dir_cannot_lead_out_of_it(
    default: str, empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hydra 1.3 reads any file of the machine by .. and //."""
    monkeypatch.setenv("ELSEWHERE", "../../evil/transform/callback")
    write_hostile(Path("evil"), "transform/callback.yaml")
    write_harmless(Path("mine"))
    entry = default.replace("EVIL", f"{empty_folder}/evil")
    Path("mine/transform/out.yaml").write_text(f"defaults:\n- {entry}\n")
    said = refused("-cd", "mine", "transform=out")
    assert said.startswith("--config-dir must hold ")
    assert "/mine/transform/out.yaml'" in said
    assert not Path(MARKER).exists()


@pytest.mark.parametrize("flags", [["-cd", "mine"], ["-m", "-cd", "mine"], []])
def test_an_option_cannot_lead_out_of_a_config_dir(flags: list[str], empty_folder: Path) -> None:
    write_hostile(Path("evil"), "transform/callback.yaml")
    write_harmless(Path("mine"))
    for option in ("../../evil/transform/callback", f"/{empty_folder}/evil/transform/callback", "../transform/small"):
        for word in (f"transform={option}", f"transform=auto,{option}")[: 2 if "-m" in flags else 1]:
            assert "transform must be one of auto, plain, imagenet" in refused(*flags, word)
    assert not Path(MARKER).exists()


def test_every_swept_option_is_checked_however_many() -> None:
    write_hostile(Path("evil"), "transform/callback.yaml")
    write_harmless(Path("mine"))
    out = "../../evil/transform/callback"
    said = refused("-m", "-cd", "mine", f"transform={','.join(['auto'] * MAX_CHECKED)},{out}")
    assert said.endswith(f"got {out!r}. See --help.")


def test_a_config_dir_cannot_replace_options_of_hydra() -> None:
    """A file of Hydra's own groups would steer it without naming it."""
    Path("mine/hydra/launcher").mkdir(parents=True)
    Path("mine/hydra/launcher/slurm.yaml").write_text("kind: torchrun\n")
    command = check_command(["-cd", "mine", "-m", "hydra/launcher=slurm"])
    assert compose_config(["hydra/launcher=slurm"]).hydra.launcher.kind == "slurm"
    assert "mine" not in " ".join(command.argv), "Hydra is not told of the folder"


@pytest.mark.parametrize("flags", [("-cd", "--config-dir"), ("--config-dir", "-cd"), ("-cd", "-cd")])
def test_a_harmless_config_dir_does_not_vouch_for_another(flags: tuple[str, str]) -> None:
    """The last one wins for argparse, whichever way it is spelled."""
    write_hostile(Path("evil"), "transform/callback.yaml")
    write_harmless(Path("mine"))
    Path("mine/transform/small.yaml").rename("mine/transform/callback.yaml")
    first, second = flags
    refused(first, "mine", second, "evil", "transform=callback")


@pytest.mark.parametrize("group", ["callbacks", "launcher", "job_logging"])
@pytest.mark.usefixtures("evil")
def test_hydras_own_groups_are_closed_to_a_config_dir(group: str) -> None:
    for sign in ("", "+"):
        refused("-cd", "evil", f"{sign}hydra/{group}=evil")


@pytest.mark.parametrize("name", ["config", "schema"])
def test_a_config_dir_cannot_replace_the_schema(name: str) -> None:
    Path("mine").mkdir()
    (Path("mine") / f"{name}.yaml").write_text("seed: 5\n")
    assert compose_config(check_command(["-cd", "mine"]).words).seed == 0


@pytest.mark.parametrize("flag", ["--run", "-r", "--multirun", "-m", "--resolve", "--help", "-h", "--info", "-sc"])
@pytest.mark.parametrize("word", [f"+hydra.callbacks.x={TARGET}", "hydra/launcher=evil", "+hydra.job.env_set={A: b}"])
def test_no_flag_carries_a_hostile_word(flag: str, word: str) -> None:
    """`--run=WORD` must not come apart into `--run WORD` once it was checked."""
    refused(f"{flag}={word}")
    refused(flag, word)


@pytest.mark.parametrize("flag", ["--info", "-i", "--cfg", "-c", "--package", "-p", "--config-dir", "-cd"])
@pytest.mark.parametrize("option", ["--experimental-rerun=evil/config.pickle", "--config-path=evil", "-cn=evil"])
@pytest.mark.usefixtures("evil")
def test_no_flag_swallows_a_hostile_option(flag: str, option: str) -> None:
    """argparse never takes an option for another option's value, so the check may not either."""
    refused(flag, option)
    refused(f"{flag}={option}")
    refused(option, flag)
    assert not Path(MARKER).exists()


@pytest.mark.parametrize(
    "word",
    ["data.root=/data/target_/x", "data.root=/hydra.callbacks/--exp", "output.dir=/x/run@2", "data.root='a=b,c'"],
)
def test_harmless_look_alikes_pass(word: str) -> None:
    check_command(["data=folder", "data.root=/x", word])


@pytest.mark.parametrize("mode", ["2", "MULTIRUN", "${oc.env:MODE}"])
def test_only_the_flag_chooses_a_sweep(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise Hydra could sweep, and every rank into a folder of its own."""
    monkeypatch.setenv("MODE", "MULTIRUN")
    refused(f"hydra.mode={mode}")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["batch_size="], "batch_size must be a value or a list of values, got 'batch_size='. Give batch_size=A,B."),
        (["batch_size=range(5,5)"], "batch_size must be a value or a list of values, got 'batch_size=range(5,5)'."),
        (["batch_size=interval(1,5)"], "batch_size must be a value or a list of values, got"),
        (["batch_size=4,8", "output.dir=mine"], "output.dir must be a folder for each job of a sweep, got 'mine'."),
        (["batch_size=4,8", "sweep.repeats=0"], "sweep.repeats must be at least 1, got 0."),
        (["batch_size=4,8", "sweep.repeat=2"], "sweep.repeat must be left to sweep.repeats"),
        (["data.size=10,many"], "data.size must be an integer, got 'many'."),
        (["data=fake,nothing"], "data must be one of fake, folder, list, webdataset, parquet, array, got 'nothing'."),
        (["sweep=batch_size"], "sweep must be added as +sweep=batch_size, got 'sweep=batch_size'."),
        (["+sweep=mine"], "sweep must be added as +sweep=batch_size, got '+sweep=mine'."),
    ],
)
def test_a_sweep_that_makes_no_sense_is_one_line(words: list[str], line: str) -> None:
    assert line in refused("--multirun", *words)


def test_the_round_is_the_slowest_dimension_of_a_sweep() -> None:
    command = check_command(["+sweep=batch_size", "seed=1,2", "sweep.repeats=4", "seed=3,4"])
    assert (command.multirun, command.swept, command.stop_on_oom) == (True, ("batch_size", "seed"), True)
    swept = [word for word in command.words if "," in word]
    assert [word.partition("=")[0] for word in swept] == ["sweep.repeat", "batch_size", "seed"]
    assert (swept[0], swept[-1]) == ("sweep.repeat=range(1,5)", "seed=3,4")
    other = check_command(["+sweep=batch_size", "batch_size=7,9"])
    assert [word for word in other.words if word.startswith("batch_size=")] == ["batch_size=7,9"]
