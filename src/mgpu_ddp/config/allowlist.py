"""Refuses a command line that could run code.

Hydra imports and calls whatever a `_target_` names (callbacks, launchers, log handlers) while it starts. Whether a
key exists and takes its value is for `overrides` to check.
"""

import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from mgpu_ddp.config.checks import MAX_BRACKETS, count_brackets, require
from mgpu_ddp.config.schema import GROUPS
from mgpu_ddp.errors import UsageError

FLAGS: dict[str, str | None] = {
    **dict.fromkeys(("-h", "--help", "--hydra-help", "--version"), None),
    **dict.fromkeys(("-m", "--multirun", "-r", "--run", "--resolve"), None),
    **dict.fromkeys(("-c", "--cfg"), "job|hydra|all"),
    **dict.fromkeys(("-i", "--info"), "(all|config|defaults|defaults-tree|plugins|searchpath)?"),
    **dict.fromkeys(("-p", "--package"), r"[\w.@]+"),
    **dict.fromkeys(("-sc", "--shell-completion"), "(install|uninstall|query)=(bash|fish|zsh)"),
    **dict.fromkeys(("-cd", "--config-dir"), "[^-].*"),
}
"""Hydra's flags that may be given, each with the values it takes; None for none. A config folder is read by `options`,
not by Hydra."""
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
MODES = {"-r", "-m", "-c", "-i", "-sc"}
"""Hydra raises where two of these are given."""
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

MAX_ITEMS = 1000
"""Items of a list or a dict in a word: Hydra takes seconds to parse 5,000, and four times as long for twice as many."""


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
        if flag in ("-i", "--info") and not value:
            # argparse would take the next word for its value.
            value = "all"
        # One name for both spellings: argparse would take the last of the two.
        flags[SHORT.get(flag, flag)] = value or None
    remedy = "Leave the others out."
    modes = [flag for flag in flags if flag in MODES]
    require(
        len(modes) <= 1,
        "option",
        "one of --run, --multirun, --cfg, --info, --shell-completion",
        " ".join(modes),
        remedy,
    )
    ok = "--resolve" not in flags or not {"-c", "-h"}.isdisjoint(flags)
    require(ok, "--resolve", "given with --cfg or --help", " ".join(flags), "Add --cfg job.")
    return flags, words


def parse(words: Sequence[str]) -> list[Override]:
    """Parse overrides by Hydra's grammar, and refuse those that could run code."""
    parser = OverridesParser.create()
    overrides: list[Override] = []
    for word in words:
        remedy = "Make it shorter; sweep numbers by range(A,B)."
        ok = count_brackets(word) <= MAX_BRACKETS
        require(ok, "override", f"a word of at most {MAX_BRACKETS} brackets", f"{word[:40]}...", remedy)
        ok = word.count(",") < MAX_ITEMS or set("[{").isdisjoint(word)
        require(ok, "override", f"a word with lists of at most {MAX_ITEMS} items", f"{word[:40]}...", remedy)
        try:
            override = parser.parse_override(word)
        except (HydraException, ValueError):
            # Python converts no integer of thousands of digits.
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
