"""Refuses a command line or a config folder that could run code.

Hydra imports and calls whatever a `_target_` names (callbacks, launchers, log handlers) while it starts. Whether a
key exists and takes its value is for `overrides` to check.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

from mgpu_ddp.config.checks import require
from mgpu_ddp.config.schema import GROUPS
from mgpu_ddp.errors import UsageError

FLAGS: dict[str, str | None] = {
    **dict.fromkeys(("-h", "--help", "--hydra-help", "--version"), None),
    **dict.fromkeys(("-m", "--multirun", "-r", "--run", "--resolve"), None),
    **dict.fromkeys(("-c", "--cfg"), "job|hydra|all"),
    **dict.fromkeys(("-i", "--info"), "(all|config|defaults|defaults-tree|plugins|searchpath)?"),
    **dict.fromkeys(("-p", "--package"), r"[\w.@]+"),
    **dict.fromkeys(("-sc", "--shell-completion"), r"(install|uninstall|query)=\w+"),
    **dict.fromkeys(("-cd", "--config-dir"), "[^-].*"),
}
"""Hydra's flags that may pass, each with the values it takes; None for none."""
SHORT = {
    "--help": "-h",
    "--multirun": "-m",
    "--run": "-r",
    "--cfg": "-c",
    "--info": "-i",
    "--package": "-p",
    "--shell-completion": "-sc",
    "--config-dir": "-cd",
}
SWEEPS = ("batch_size",)
"""The sweeps of conf/sweep."""
OPEN_GROUPS = {
    "hydra/launcher": ("basic", "torchrun", "slurm"),
    "hydra/sweeper": ("basic", "optuna"),
    "hydra/sweeper/sampler": ("tpe", "random", "grid"),
}
"""Hydra chooses launchers and sweepers by `_target_`; these are the ones it may."""
OPEN_KEYS = {
    **dict.fromkeys(("run.dir", "sweep.dir", "sweep.subdir", "job.name", "verbose"), ""),
    **dict.fromkeys(("launcher.nproc_per_node", "launcher.max_restarts"), "hydra/launcher=torchrun"),
    **dict.fromkeys(("launcher.nodes", "launcher.ntasks_per_node"), "hydra/launcher=slurm"),
    **dict.fromkeys(("launcher.gpus_per_node", "launcher.cpus_per_task", "launcher.mem"), "hydra/launcher=slurm"),
    **dict.fromkeys(("launcher.time", "launcher.partition", "launcher.account"), "hydra/launcher=slurm"),
    **dict.fromkeys(("launcher.qos", "launcher.constraint"), "hydra/launcher=slurm"),
    **dict.fromkeys(("sweeper.n_trials", "sweeper.direction", "sweeper.study_name"), "hydra/sweeper=optuna"),
    "sweeper.sampler.seed": "hydra/sweeper=optuna",
}
"""The keys below hydra that cannot make it import code or open files, each with the choice it needs."""

NAME = r"[\w-][\w .-]*"
DEFAULT = re.compile(rf"/?{NAME}(/{NAME})*(@[\w.]+)?")
"""An entry of a defaults list that stays within the folder: Hydra takes // and .. to lead out of it."""
DEFAULT_OPTION = re.compile(rf"{NAME}(/{NAME})*")


def split(argv: Sequence[str]) -> tuple[dict[str, str | None], list[str]]:
    """Sort arguments into flags with their values and overrides; only known flags pass."""
    flags: dict[str, str | None] = {}
    words: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            words.append(word)
            continue
        flag, equals, value = word.partition("=")
        remedy = "See --help; overrides are key=value, without dashes."
        require(flag in FLAGS, "option", "one of Hydra's safe flags", word, remedy)
        pattern = FLAGS[flag]
        if pattern is not None and not equals and rest and re.fullmatch(pattern, rest[0]):
            value = rest.pop(0)
        require(re.fullmatch(pattern or "", value) is not None, flag, pattern or "alone", value, remedy)
        # One name for both spellings: argparse would take the last of the two.
        flags[SHORT.get(flag, flag)] = value or None
    return flags, words


def parse(words: Sequence[str]) -> list[Override]:
    """Parse overrides by Hydra's grammar, and refuse those that could run code."""
    parser = OverridesParser.create()
    overrides: list[Override] = []
    for word in words:
        try:
            override = parser.parse_override(word)
        except HydraException:
            raise UsageError(
                f"override must be key=value in Hydra's grammar, got {word!r}. Quote values that hold , = ~ or braces,"
                " also for the shell: 'key=\"value\"'."
            ) from None
        _refuse_code(override)
        overrides.append(override)
    return overrides


def _refuse_code(override: Override) -> None:
    key, line = override.key_or_group, str(override.input_line)
    require(bool(key) and override.package is None, "override", "key=value", line, "Leave @package out.")
    require("_target_" not in line, key, "free of _target_", line, "Leave it out: no configuration can name code.")
    require(not override.is_delete(), key, "there", line, f"Leave ~{key} out.")
    if key == "sweep":
        ok = override.is_add() and override.value() in SWEEPS
        require(ok, key, f"added as {' or '.join(f'+sweep={name}' for name in SWEEPS)}", line, "See --help.")
    elif key in OPEN_GROUPS:
        require(override.value() in OPEN_GROUPS[key], key, " or ".join(OPEN_GROUPS[key]), line, f"Leave {key} out.")
    elif key.split(".")[0].split("/")[0] == "hydra":
        rule = f"one of Hydra's harmless keys ({', '.join(f'hydra.{name}' for name in OPEN_KEYS)})"
        remedy = "Leave it out; --multirun sweeps."
        require(key.removeprefix("hydra.") in OPEN_KEYS and key.startswith("hydra."), key, rule, line, remedy)
    elif key in GROUPS:
        is_name = override.is_sweep_override() or isinstance(override.value(), str)
        require(is_name, key, f"one of {', '.join(GROUPS[key])}", line, "See --help.")


def refuse_code_in_files(folder: Path) -> None:
    """Refuse a config folder in which any file speaks of Hydra or of targets, or leads out of the folder.

    Chosen or not: a sweep may choose it.
    """
    for name in ("config.yaml", "schema.yaml"):
        remedy = "Give the file another name."
        require(not (folder / name).exists(), "--config-dir", f"without {name}", str(folder), remedy)
    for path in yaml_files(folder):
        try:
            text, content = path.read_text(), OmegaConf.to_container(OmegaConf.load(path))
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"--config-dir must hold readable YAML, got {str(path)!r} ({reason}). Fix it.") from None
        spoken = [str(path.relative_to(folder)), text, *(f"{key} {value}" for key, value in _leaves(content, ""))]
        for word in ("hydra", "_target_"):
            ok = not any(word in part for part in spoken)
            require(ok, "--config-dir", f"free of {word}", str(path), "Leave it out: files cannot steer Hydra.")
        ok = not isinstance(content, dict) or _stays_inside(content.get("defaults", []))
        require(ok, "--config-dir", "without defaults that lead out of it", str(path), "Name files of the folder.")


def yaml_files(folder: Path) -> list[Path]:
    """The YAML files of a config folder. Links are followed, as Hydra follows them."""
    paths = (Path(top) / name for top, _, names in os.walk(folder, followlinks=True) for name in names)
    return sorted(path for path in paths if path.suffix in (".yaml", ".yml"))


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    items: Iterator[tuple[Any, Any]]
    if isinstance(node, dict):
        items = iter(node.items())
    elif isinstance(node, list):
        items = iter(enumerate(node))
    else:
        yield prefix, node
        return
    for key, child in items:
        yield from _leaves(child, f"{prefix}.{key}" if prefix else str(key))


def _stays_inside(defaults: Any) -> bool:
    """Check that a defaults list names only what is in the folder, or in the package's own configuration."""
    if not isinstance(defaults, list):
        return False
    for entry in defaults:
        groups = entry if isinstance(entry, dict) else {entry: None}
        for group, options in groups.items():
            names = options if isinstance(options, list) else [options]
            known = all(name is None or DEFAULT_OPTION.fullmatch(str(name)) for name in names)
            if not (known and DEFAULT.fullmatch(str(group))):
                return False
    return True
