"""From what the user typed to a command that is safe to run, before Hydra acts on it.

Hydra imports and calls whatever a `_target_` names (callbacks, launchers, log handlers) while it starts, so
the command line is read, composed and checked here first. A mistake becomes one line in this project's words.
"""

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from mgpu_ddp.config.allowlist import OPEN_GROUPS, parse, refuse_code_in_files, split, unknown_key
from mgpu_ddp.config.checks import require
from mgpu_ddp.config.help import documented_keys
from mgpu_ddp.config.schema import GROUPS, SweepConfig, to_config
from mgpu_ddp.errors import UsageError

MAX_COMPOSED = 100
"""Values of a swept key that are checked before its sweep begins."""
INFORMATIONAL = {"-h", "--hydra-help", "--version", "-i", "-sc", "-c"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A checked command line."""

    words: list[str]
    """What was typed: flags first, because argparse wants overrides in one piece."""
    informational: bool
    multirun: bool
    swept: tuple[str, ...] = ()
    """Keys whose values a sweep varies."""
    stop_on_oom: bool = False
    isolated: bool = False
    """Whether each job gets a launcher of its own."""
    folder: str = ""
    """The run or sweep folder: a restart finds the one that its launch began in."""

    @property
    def argv(self) -> list[str]:
        """What Hydra gets."""
        pinned = [f"hydra.{'sweep' if self.multirun else 'run'}.dir={quote(self.folder)}"] if self.folder else []
        return [*self.words, *pinned]


def register_resolvers() -> None:
    """Give Hydra's configuration `${run_dir:chosen,default}`: the chosen folder, else a fresh default."""
    OmegaConf.register_new_resolver("run_dir", _run_dir, replace=True)


def _run_dir(chosen: str | None, default: str) -> str:
    # The suffix keeps two starts within one second apart.
    return str(chosen) if chosen is not None else f"{default}-{secrets.token_hex(3)}"


def check_command(argv: Sequence[str]) -> Command:
    """Read, guard and compose the command line. Rank 0 only.

    Raises:
        UsageError: an unknown key or value, or anything that could run code.
    """
    flags, words = split(argv)
    overrides = parse(words)
    informational = not INFORMATIONAL.isdisjoint(flags)
    multirun = "-m" in flags
    typed = [part for flag, value in flags.items() for part in (flag, value) if part is not None]
    ordered = [*typed, *words]
    if informational and "-c" not in flags:
        return Command(words=ordered, informational=True, multirun=False)

    # Of a sweep, its first point: a key may belong to a swept choice of its group.
    first = {o.key_or_group: next(iter(_values(o)), "") for o in overrides}
    cfg = _compose([line for line in first.values() if line], flags.get("-cd"))
    multirun = multirun or cfg.hydra.mode == RunMode.MULTIRUN
    for override in overrides:
        ok = multirun or not override.is_sweep_override()
        require(ok, override.key_or_group, "one value", override.input_line, "Add --multirun to sweep, or quote it.")
    if informational:
        return Command(words=ordered, informational=True, multirun=False)
    HydraConfig.instance().set_config(cfg)
    if multirun:
        return _sweep(cfg, typed, overrides, flags.get("-cd"))
    task = cfg.copy()
    OmegaConf.set_struct(task, False)
    del task["hydra"]
    to_config(task)
    return Command(words=ordered, informational=False, multirun=False, folder=_folder(cfg, "hydra.run.dir"))


def _folder(cfg: DictConfig, key: str) -> str:
    return str(Path(str(OmegaConf.select(cfg, key))).absolute())


def _values(override: Override) -> list[str]:
    """What an override sets, one word for each value it sweeps."""
    if not override.is_discrete_sweep():
        return [] if override.is_sweep_override() else [override.input_line or ""]
    value = override.value()
    if isinstance(value, Glob):
        return [
            f"{override.get_key_element()}={name}" for name in value.filter(list(GROUPS.get(override.key_or_group, ())))
        ]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _sweep(cfg: DictConfig, flags: list[str], overrides: list[Override], config_dir: str | None) -> Command:
    """The command of a sweep, whose first dimension, and so the slowest, is the round."""
    # The last of a key counts, as where there is no sweep; a sweeper may see that otherwise.
    last = {override.key_or_group: override for override in overrides}
    overrides, words = list(last.values()), [override.input_line or "" for override in last.values()]
    settings = SweepConfig(repeats=cfg.sweep.repeats, stop_on_oom=cfg.sweep.stop_on_oom)
    choices = cfg.hydra.runtime.choices
    basic = choices["hydra/sweeper"] == "basic"
    given = {override.key_or_group for override in overrides}
    params = {key: value for key, value in (cfg.hydra.sweeper.get("params") or {}).items() if key not in given}
    overrides = [*parse([f"{key}={value}" for key, value in params.items()]), *overrides]
    first = {override.key_or_group: next(iter(_values(override)), "") for override in overrides}
    for override in overrides:
        key, values = override.key_or_group, _values(override)
        ok = (bool(values) or not (basic or override.is_discrete_sweep())) and f"{key}=" not in values
        require(ok, key, "a value or a list of values", override.input_line, f"Give {key}=A,B.")
        for value in values[1:MAX_COMPOSED]:
            # Hydra would say in its own words that a value has not the type of its key.
            _compose([word for word in (first | {key: value}).values() if word], config_dir)
    swept = tuple(override.key_or_group for override in overrides if override.is_sweep_override())
    folder = OmegaConf.to_container(cfg.output, resolve=False)["dir"]  # type: ignore[index, call-overload]
    remedy = "Leave it out: hydra.sweep.dir=DIR is the folder of the whole sweep."
    require(folder is None or "${" in folder, "output.dir", "a folder for each job of a sweep", folder, remedy)
    if basic:
        # Hydra itself would put those of a file before the round.
        rounds = f"sweep.repeat=range(1,{settings.repeats + 1})"
        words = ["hydra.sweeper.params=null", rounds, *(f"{key}={value}" for key, value in params.items()), *words]
    else:
        rule = f"1 with hydra/sweeper={choices['hydra/sweeper']}, which draws its own points"
        require(settings.repeats == 1, "sweep.repeats", rule, settings.repeats, "Leave it out.")
        if "hydra.sweeper.direction" not in given:
            # The objective is images/s.
            words = [*words, "hydra.sweeper.direction=maximize"]
    return Command(
        words=[*flags, *words],
        informational=False,
        multirun=True,
        swept=swept,
        stop_on_oom=settings.stop_on_oom,
        isolated=choices["hydra/launcher"] != "basic",
        folder=_folder(cfg, "hydra.sweep.dir"),
    )


def quote(value: str) -> str:
    """Quote a string for Hydra's override grammar."""
    # Inside quotes a backslash is itself, but for those that stand before a quote.
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value)
    # OmegaConf reads ${ as its own unless it is escaped, and then backslashes before it as well.
    escaped = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", escaped)
    return f"'{escaped}'"


def _compose(overrides: list[str], config_dir: str | None) -> DictConfig:
    if config_dir is not None:
        require(Path(config_dir).is_dir(), "--config-dir", "a folder", config_dir, "Name an existing folder.")
        refuse_code_in_files(Path(config_dir))
        overrides = [*overrides, f"hydra.searchpath=[{quote('file://' + str(Path(config_dir).absolute()))}]"]
    try:
        with initialize_config_module("mgpu_ddp.conf", version_base="1.3"):
            return compose("config", overrides=overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UsageError(explain(error, overrides)) from None


def explain(error: Exception, overrides: list[str]) -> str:
    """Say in one line which key broke which rule."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    keys = documented_keys()
    for override in overrides:
        name, _, value = override.lstrip("+").partition("=")
        if isinstance(cause, ValidationError) and cause.full_key == name:
            kind = keys[name].kind if name in keys else "a group of keys"
            return f"{name} must be {kind}, got {value!r}. See --help."
        if name in OPEN_GROUPS:
            return f"{name} must be installed, got {value!r}. Install its plugin (pip install hydra-{value}-sweeper)."
        if name in GROUPS and value not in GROUPS[name] and f"{name}/{value}" in str(error):
            remedy = f"Choose it by model.name={value}." if name == "model" else "See --help."
            if (name, value) == ("model", "exported"):
                remedy = "To load an exported program is to run code that its file holds: give a checkpoint instead."
            return f"{name} must be {keys[name].kind}, got {value!r}. {remedy}"
        if f"'{name}'" in str(error) or f"{name}=" in str(error):
            return unknown_key(name, override)
    return f"the configuration must compose, got: {' '.join(str(error).split())}. See --help."
