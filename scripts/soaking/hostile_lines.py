"""Command lines with options of the user's own in which code, files or floods hide."""

import random
from pathlib import Path

from mgpu_ddp.config.help import documented_keys
from mgpu_ddp.config.schema import GROUPS
from soaking.hostile_trial import WORDS, Trial, job, spoil
from tests.support.starting import SMALL

BASE = [*SMALL, "data.size=4", "limit=4"]
MADE = ("work/outputs", "work/multirun", "work/out", "work/deep", "work/o\x1b[2Jut")
FOLDERS = ["out", "deep/er", "../work/out", "./out/", "out\n", "o\x1b[2Jut", "'${hydra.run.dir}'", "~/x"]
ASKING_MUCH = {"runtime.compile", "loader.workers", "loader.prefetch", "batch_size", "model.name", "sweep.repeats"}
"""Keys that may rightly ask for minutes, or for all of the machine."""
REFUSED = ["-1", "nan", "1e400", "'${oc.env:EVIL}'", "[1]", "9223372036854775808", "\x1b[2J", "", "{a:1}"]
SPELLINGS = ["_target_", '"_target_"', '"\\x5ftarget_"', "? _target_\n  ", "!!str _target_", "&a _target_"]
PAYLOADS = [
    "{TARGET: torch.hub.load, repo_or_dir: HERE/mine/hub, model: evil, source: local}",
    "{TARGET: os.mkdir, path: HERE/marker}",
    "{TARGET: runpy.run_path, path_name: HERE/mine/hub/hubconf.py}",
    "{(): os.mkdir, path: HERE/marker}",
    "{class: logging.FileHandler, filename: HERE/marker}",
    "!!python/object/apply:os.mkdir [HERE/marker]",
    "{<<: {TARGET: os.mkdir}, path: HERE/marker}",
]
PLACES = [
    *("hydra: {callbacks: {x: PAYLOAD}}", "hydra.callbacks.x: PAYLOAD", "callbacks: {x: PAYLOAD}", "data: PAYLOAD"),
    "hydra: {hydra_logging: {version: 1, handlers: {h: PAYLOAD}, root: {handlers: [h]}}}",
    *("hydra: {launcher: PAYLOAD}", "size: PAYLOAD", "name: PAYLOAD", "_target_: os.mkdir\npath: HERE", "size: 4"),
]
NAMES = ["evil", "évil", ".yaml", "a b", "evil.yaml", "-evil", "null", "fake", "auto", "resnet", "_self_", "${x}"]
HEADERS = [
    *("", "# @package _global_\n", "# @package hydra\n", "#@package hydra.callbacks\n", "# @package _group_\n"),
    *("\ufeff# @package _global_\n", "# x\n\n# @package _global_\n", "%YAML 1.1\n---\n", "--- # @package hydra\n"),
]
DEFAULTS = [
    *("fake", "evil", "/evil", "../evil", "/data/evil", "../../mine/evil", "file://evil", "pkg://os", "fake@hydra"),
    *("override hydra/callbacks: evil", "/hydra/callbacks: evil", "optional ../evil", "hydra/callbacks@hydra: evil"),
    *("{data@hydra: evil}", "'${oc.env:EVIL}'", "/data: [evil, ../evil]", "_self_", "..", "/", ".", "data/evil"),
]
ENVIRONS = ["../evil", "[" * 5000, "${oc.env:EVIL}", "{_target_: os.mkdir, path: x}", "a\nb"]
PREFIXES = ["", "", "", "+", "++", "~", " ", "\t", "'", "hydra.", "@", "data@"]
HYDRAS = """
    callbacks.x callbacks job_logging hydra_logging.handlers.h launcher sweeper searchpath output_subdir help.template
    job.chdir job.env_set.LD_PRELOAD mode run env sweep.subdir job.name job.config.override_dirname.kv_sep runtime.cwd
    launcher.setup help output verbose sweeper.params
""".split()  # noqa: SIM905
FLAGS = """
    -m|--help|--info|--info config|--cfg all|--cfg hydra --resolve|-c job -p data|--experimental-rerun ../mine/evil|
    --config-path ../mine|-cp mine|--config-name=evil|-cn evil|--conf ../mine|--config-di=../mine|-cd../mine|--|
    -mcd ../mine|@../mine/evil.yaml|--package=hydra|--shell-completion uninstall=evil|--multirun --run|
    -r|--hydra-help|--versio|-h -m
""".split("|")  # noqa: SIM905


class Lines:
    """Makes command lines."""

    def __init__(self, _work: Path) -> None:
        names = (f"{group}.{word}" for group in GROUPS for word in ("name", "x", "_target_"))
        self._keys = [*documented_keys(), *names]

    def make(self, rng: random.Random, folder: Path) -> Trial:
        """One line beside a folder of options; most lines hold one hostile word or choice."""
        (folder / "mine" / "hub").mkdir(parents=True)
        (folder / "mine" / "hub" / "hubconf.py").write_text(f"open({str(folder / 'marker')!r}, 'w')\n")
        for group in (".", *GROUPS, "hydra/callbacks", "hydra/launcher", "sweep"):
            (folder / "mine" / group).mkdir(exist_ok=True, parents=True)
            for name in ["evil", *rng.sample(NAMES, 2)]:
                path = folder / "mine" / group / f"{name}.{rng.choice(['yaml'] * 9 + ['yml'])}"
                path.write_bytes(_option(rng, folder))
        way = rng.choice([_choice, _flags, _hydra, self._value, self._value])
        words = way(rng, folder)
        return Trial(
            what=f"a line by {way.__name__}",
            command=job(rng, *words),
            leaves_nothing={"-m", "--multirun", "-mcd"}.isdisjoint(words),
            environ={"EVIL": rng.choice(ENVIRONS)},
            may_make=lambda path: path.startswith(MADE),
        )

    def _value(self, rng: random.Random, _folder: Path) -> list[str]:
        key, value = rng.choice(self._keys), rng.choice(WORDS)
        swept = ["-m"] if rng.random() < 0.15 else []
        if key in ASKING_MUCH or key.endswith(".dir"):
            value = rng.choice(FOLDERS if key.endswith(".dir") else REFUSED)
        elif swept:
            value += f",{rng.choice(WORDS)}"
        prefix = rng.choice(PREFIXES) if rng.random() < 0.2 else ""
        return [*swept, *BASE, f"{prefix}{key}={value}"]


def _option(rng: random.Random, folder: Path) -> bytes:
    """The content of a file of options."""
    defaults = f"defaults: [{', '.join(rng.sample(DEFAULTS, rng.randint(1, 3)))}]\n" if rng.random() < 0.7 else ""
    payload = rng.choice(PAYLOADS).replace("TARGET", rng.choice(SPELLINGS))
    body = rng.choice(PLACES).replace("PAYLOAD", payload).replace("HERE", str(folder))
    text = rng.choice(HEADERS) + defaults + body + rng.choice(["\n", "\r\n---\na: 1\n", "\n...\n", ""])
    data = text.encode(rng.choice(["utf-8"] * 8 + ["utf-16", "utf-32", "utf-7"]))
    return spoil(data, rng) if rng.random() < 0.2 else data


def _choice(rng: random.Random, folder: Path) -> list[str]:
    group = rng.choice([*GROUPS, *GROUPS, "hydra/callbacks", "sweep", "+data", "data@hydra", "/data", "data/"])
    names = [*NAMES, "../evil", "/evil", f"{folder}/mine/evil", "evil,fake", "[evil,evil]", "glob(*)"]
    where = rng.choice(["../mine", str(folder / "mine"), "../mine/../mine", "../mine/data/.."])
    flag = rng.choice([["--config-dir", where], ["-cd", where], [f"--config-dir={where}"]])
    more = rng.choice([[]] * 5 + [["-m"], ["--help"], ["--cfg", "all"], ["--info"]])
    return [*more, *flag, f"{group}={rng.choice(['evil', rng.choice(names)])}", *BASE]


def _flags(rng: random.Random, folder: Path) -> list[str]:
    return [*rng.choice(FLAGS).split(), *rng.choice([BASE, _choice(rng, folder), _hydra(rng, folder)])]


def _hydra(rng: random.Random, folder: Path) -> list[str]:
    values = [
        f"{{_target_:os.mkdir,path:{folder}/marker}}",
        "evil",
        "[file://../mine]",
        "../mine",
        rng.choice(WORDS),
        "out",
    ]
    key = f"hydra{rng.choice('./')}{rng.choice(HYDRAS)}{rng.choice(['', '', '._target_', '.x', '@_global_', '[0]'])}"
    return [*BASE, f"{rng.choice(PREFIXES)}{key}{rng.choice(['=', '=', '= ', '.=', '=='])}{rng.choice(values)}"]
