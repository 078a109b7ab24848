"""One key and its value against the schema, wherever it was written."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mgpu_ddp.config.checks import require
from mgpu_ddp.config.help import documented_keys
from mgpu_ddp.config.keys import Section, keys_of
from mgpu_ddp.config.schema import GROUPS, SECTIONS, Config, section_of
from mgpu_ddp.errors import UsageError

Sections = Mapping[str, Sequence[type[Section]]]
"""The sections that a key may belong to, by its group."""


def sections_with(chosen: Mapping[str, type[Section]]) -> Sections:
    """The sections of a job that has chosen some options; of any other group all."""
    of_groups = {
        group: [chosen[group]] if group in chosen else [section_of(group, option) for option in GROUPS[group]]
        for group in GROUPS
    }
    return of_groups | {"": [Config]} | {name: [section] for name, section in SECTIONS.items()}


def check_value(key: str, value: Any, sections: Sections, line: str, shown: str) -> None:
    """Check a key, or each key of a dict, and the kind of its value.

    `line` says where the key stands, and `shown` how its value is written.

    Raises:
        UsageError: an unknown key or another kind of value, in one line.
    """
    for name, item in keys_in({key: value}):
        require(name != "sweep.repeat", name, "left to sweep.repeats", line, "Leave it out.")
        require(name not in SECTIONS and name not in GROUPS, name, "a group of keys", shown, "See --help.")
        section, field = find_key(name, sections, line)
        require(_takes(section, field, item), name, keys_of(section)[field].kind, shown, "See --help.")


def find_key(name: str, sections: Sections, line: str) -> tuple[type[Section], str]:
    """The section that a key belongs to, and its field there.

    Raises:
        UsageError: there is none.
    """
    prefix, _, field = name.rpartition(".")
    section = next((known for known in sections.get(prefix, ()) if field in keys_of(known)), None)
    if section is None:
        raise UsageError(_unknown(name, line))
    return section, field


def keys_in(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys that a mapping sets, each with its value."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and (name in SECTIONS or name in GROUPS):
            yield from keys_in(value, f"{name}.")
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


def _unknown(name: str, line: str) -> str:
    """Say that a key is not known, or not one of the chosen option."""
    if name in documented_keys():
        group, _, field = name.partition(".")
        options = [option for option in GROUPS[group] if field in keys_of(section_of(group, option))]
        remedy = f"Add {group}={' or '.join(options)}, or leave it out."
        return f"{name} must belong to the chosen {group}, got {line!r}. {remedy}"
    near = difflib.get_close_matches(name, documented_keys(), n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    return f"{name} must be a known key, got {line!r}. {hint}--help lists every key."
