"""What a command line may say: flags and keys that cannot run code, each told from a mistake in one line.

Hydra imports and calls whatever a `_target_` names (callbacks, launchers, log handlers) while it starts.
"""

import difflib
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
from mgpu_ddp.config.help import documented_keys
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
OPEN_KEYS = (
    *("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.job.name", "hydra.verbose"),
    *("hydra.launcher.nproc_per_node", "hydra.launcher.max_restarts", "hydra.launcher.nodes"),
    *("hydra.launcher.ntasks_per_node", "hydra.launcher.gpus_per_node", "hydra.launcher.cpus_per_task"),
    *("hydra.launcher.mem", "hydra.launcher.time", "hydra.launcher.partition", "hydra.launcher.account"),
    *("hydra.launcher.qos", "hydra.launcher.constraint"),
    *("hydra.sweeper.n_trials", "hydra.sweeper.direction", "hydra.sweeper.study_name", "hydra.sweeper.sampler.seed"),
)
"""The keys of Hydra's own configuration that cannot make it import code or open files."""
OPEN_GROUPS = {
    "hydra/launcher": ("basic", "torchrun", "slurm"),
    "hydra/sweeper": ("basic", "optuna"),
    "hydra/sweeper/sampler": ("tpe", "random", "grid"),
}
"""Hydra chooses launchers and sweepers by `_target_`; these are the ones it may."""


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


def parse(words: list[str]) -> list[Override]:
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
        _refuse_key(override)
        overrides.append(override)
    return overrides


def _refuse_key(override: Override) -> None:
    key, line = override.key_or_group, str(override.input_line)
    require(bool(key) and override.package is None, "override", "key=value", line, "Leave @package out.")
    require(key != "sweep.repeat", key, "left to sweep.repeats", line, "Leave it out.")
    if key == "sweep":
        ok = override.is_add() and override.value() in SWEEPS
        require(ok, key, f"added as {' or '.join(f'+sweep={name}' for name in SWEEPS)}", line, "See --help.")
        return
    require("_target_" not in line, key, "free of _target_", line, "Configuration cannot name code to run.")
    if key in OPEN_GROUPS:
        require(override.value() in OPEN_GROUPS[key], key, " or ".join(OPEN_GROUPS[key]), line, f"Leave {key} out.")
    elif key.split(".")[0].split("/")[0] == "hydra":
        rule = f"one of Hydra's harmless keys ({', '.join(OPEN_KEYS)})"
        require(key in OPEN_KEYS and not override.is_delete(), key, rule, line, "Leave it out; --multirun sweeps.")
    else:
        is_name = override.is_delete() or override.is_sweep_override() or isinstance(override.value(), str)
        require(key not in GROUPS or is_name, key, f"one of {', '.join(GROUPS.get(key, ()))}", line, "See --help.")
        require(not override.is_delete(), key, "there", line, f"Leave ~{key} out.")
        if (override.is_add() or override.is_force_add()) and key not in documented_keys():
            raise UsageError(unknown_key(key, line))


def refuse_code_in_files(folder: Path) -> None:
    """Refuse a config folder in which any file speaks of Hydra or of targets, chosen or not: a sweep may choose it."""
    for name in ("config.yaml", "schema.yaml"):
        require(
            not (folder / name).exists(), "--config-dir", f"without {name}", str(folder), "Name the file otherwise."
        )
    # Links are followed, as Hydra follows them.
    paths = [Path(top) / name for top, _, names in os.walk(folder, followlinks=True) for name in names]
    for path in sorted(path for path in paths if path.suffix in (".yaml", ".yml")):
        try:
            text = path.read_text()
            spoken = [
                text,
                *(f"{key} {value}" for key, value in _leaves(OmegaConf.to_container(OmegaConf.load(path)), "")),
            ]
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"--config-dir must hold readable YAML, got {str(path)!r} ({reason}). Mend it.") from None
        for word in ("hydra", "_target_"):
            ok = not any(word in part for part in spoken)
            require(ok, "--config-dir", f"free of {word}", str(path), "Configuration files cannot steer Hydra.")


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


def unknown_key(name: str, override: str) -> str:
    if name in documented_keys():
        group = name.partition(".")[0]
        options = [option for option, schema in GROUPS.get(group, {}).items() if hasattr(schema, name.split(".")[-1])]
        return f"{name} must belong to the chosen {group}, got {override!r}. Add {group}={' or '.join(options)}."
    near = difflib.get_close_matches(name, documented_keys(), n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    return f"{name} must be a known key, got {override!r}. {hint}--help lists every key."
