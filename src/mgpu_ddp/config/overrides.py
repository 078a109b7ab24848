"""Overrides checked against the schema, before Hydra composes: a key that exists, an option, a value of its kind."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Glob, Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mgpu_ddp.config.allowlist import OPEN_GROUPS, OPEN_KEYS, parse, yaml_files
from mgpu_ddp.config.checks import require
from mgpu_ddp.config.help import documented_keys
from mgpu_ddp.config.keys import Section, keys_of
from mgpu_ddp.config.schema import GROUPS, SECTIONS, Config, section_of
from mgpu_ddp.errors import UsageError

MAX_CHECKED = 100
"""Values of a swept key that are checked before its sweep begins."""
PLUGINS = {"optuna": "hydra_optuna_sweeper"}
"""Sweepers that are not Hydra's own, with their packages."""
Options = dict[str, list[str]]
"""Options of each group that are files of the user's own."""


def options_in(folder: Path) -> Options:
    """The options that a config folder adds to the groups, by the path below its group's folder."""
    return {
        group: [str(path.relative_to(folder / group).with_suffix("")) for path in yaml_files(folder / group)]
        for group in GROUPS
    }


def points_of(overrides: Sequence[Override], own: Options) -> Iterator[list[Override]]:
    """The first point of a sweep, then that point with each other value of each key.

    A range that a sweeper draws from stands in every point as it is, and a line that sweeps nothing is its only point.
    """
    values = [values_of(override, own) or [override] for override in overrides]
    first = [words[0] for words in values]
    yield first
    for place, words in enumerate(values):
        for word in words[1:]:
            yield [*first[:place], word, *first[place + 1 :]]


def values_of(override: Override, own: Options) -> list[Override]:
    """An override for each different value that this one sweeps; none for a range that a sweeper draws from.

    All options of a group, for they choose files; of other keys the first `MAX_CHECKED` values.
    """
    if not override.is_sweep_override():
        return [override]
    if not override.is_discrete_sweep():
        return []
    group, value = override.key_or_group, override.value()
    if isinstance(value, Glob):
        values = iter(value.filter([*GROUPS.get(group, ()), *own.get(group, ())]))
    else:
        values = override.sweep_string_iterator()
    checked = dict.fromkeys(values if group in GROUPS else islice(values, MAX_CHECKED))
    return parse([f"{override.get_key_element()}={value}" for value in checked])


def lines_of(point: Iterable[Override]) -> list[str]:
    """The overrides of a point as Hydra takes them."""
    return [str(override.input_line) for override in point if not override.is_sweep_override()]


def check_point(point: Sequence[Override], own: Options) -> None:
    """Check the overrides of one job.

    Raises:
        UsageError: an unknown key, option or kind of value, in one line.
    """
    chosen = {override.key_or_group: str(override.value()) for override in point}
    sections = {group: _sections_of(group, chosen.get(group), own) for group in GROUPS}
    sections |= {"": [Config]} | {name: [section] for name, section in SECTIONS.items()}
    for override in point:
        key = override.key_or_group
        if key in GROUPS:
            _check_option(override, own)
        elif key in OPEN_GROUPS:
            _check_plugin(override, chosen)
        elif key.startswith("hydra."):
            _check_choice(override, OPEN_KEYS[key.removeprefix("hydra.")], chosen)
        elif key != "sweep":
            _check_job_key(override, sections)


def _check_option(override: Override, own: Options) -> None:
    group, value = override.key_or_group, str(override.value())
    known = [*GROUPS[group], *own.get(group, ())]
    remedy = "See --help."
    if group == "model":
        remedy = f"Choose it by model.name={value}."
    if (group, value) == ("model", "exported"):
        remedy = "To load an exported program is to run code that its file holds: give a checkpoint instead."
    require(value in known, group, f"one of {', '.join(known)}", value, remedy)
    is_plain = not (override.is_add() or override.is_force_add())
    require(is_plain, group, "chosen without +", override.input_line, f"Write {group}={value}.")


def _check_plugin(override: Override, chosen: dict[str, str]) -> None:
    group, value = override.key_or_group, str(override.value())
    package = PLUGINS.get(value, "")
    installed = not package or find_spec(f"hydra_plugins.{package}") is not None
    require(installed, group, "installed", value, f"Install its plugin (pip install {package.replace('_', '-')}).")
    if group == "hydra/sweeper/sampler":
        _check_choice(override, "hydra/sweeper=optuna", chosen)


def _check_choice(override: Override, needed: str, chosen: dict[str, str]) -> None:
    """Check that a choice, such as hydra/launcher=slurm, was made that a key is for."""
    group, _, option = needed.partition("=")
    made = not needed or chosen.get(group) == option
    require(made, override.key_or_group, f"given with {needed}", override.input_line, f"Add {needed}.")


def _sections_of(group: str, option: str | None, own: Options) -> list[type[Section]]:
    """The sections whose keys a chosen option may have: any of its group, where a file of the user's own says which."""
    if option is None:
        option = next(iter(GROUPS[group]))
    known = option in GROUPS[group] and option not in own.get(group, ())
    return [section_of(group, name) for name in ([option] if known else GROUPS[group])]


def _check_job_key(override: Override, sections: dict[str, list[type[Section]]]) -> None:
    line, raw = str(override.input_line), override.get_value_string()
    for name, value in _flat(override.key_or_group, override.value()):
        require(name != "sweep.repeat", name, "left to sweep.repeats", line, "Leave it out.")
        require(name not in SECTIONS, name, "a group of keys", raw, "See --help.")
        prefix, _, field = name.rpartition(".")
        section = next((known for known in sections.get(prefix, ()) if field in keys_of(known)), None)
        if section is None:
            raise UsageError(unknown_key(name, line))
        if not override.is_sweep_override():
            kind = keys_of(section)[field].kind
            require(_takes(section, field, value), name, kind, raw, "See --help.")


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The keys that a value sets: several, where it is a dict."""
    if isinstance(value, dict) and (name in SECTIONS or name in GROUPS):
        for key, child in value.items():
            yield from _flat(f"{name}.{key}", child)
    else:
        yield name, value


def _takes(section: Any, field: str, value: Any) -> bool:
    """Ask OmegaConf, which converts values, whether a field takes one."""
    if bool in keys_of(section)[field].kinds and re.fullmatch(r"[+-]?\d+", str(value)) and str(value) not in ("0", "1"):
        # Any other number would be true.
        return False
    try:
        OmegaConf.update(_node_of(section), field, value, merge=False)
    except OmegaConfBaseException:
        return False
    return True


@cache
def _node_of(section: Any) -> DictConfig:
    """A section to try values on."""
    node: DictConfig = OmegaConf.structured(section)
    return node


def unknown_key(name: str, line: str) -> str:
    """Say that a key is not known, or not one of the chosen option."""
    if name in documented_keys():
        group, _, field = name.partition(".")
        options = [option for option in GROUPS[group] if field in keys_of(section_of(group, option))]
        return f"{name} must belong to the chosen {group}, got {line!r}. Add {group}={' or '.join(options)}."
    near = difflib.get_close_matches(name, documented_keys(), n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    return f"{name} must be a known key, got {line!r}. {hint}--help lists every key."
