"""The options of each group: the package's, and a user's own.

Those are files below `--config-dir`. This package reads them as data, and gives Hydra what they come to as options of
its ConfigStore. Hydra is never told of the folder: it trusts whatever it reads.
"""

import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mgpu_ddp.config.checks import MAX_BRACKETS, count_brackets, require, words_of
from mgpu_ddp.config.compose import REPLACE
from mgpu_ddp.config.keys import Section
from mgpu_ddp.config.schema import GROUPS, section_of
from mgpu_ddp.config.script import ITSELF
from mgpu_ddp.config.values import check_value, keys_in, sections_with
from mgpu_ddp.errors import UsageError, cause_of

NAME = re.compile(r"\w[\w.-]*")
PACKAGE = re.compile(r"\s*#\s*@package\s+(\S+)\s*")
MAX_BYTES = 65_536
MAX_DEPTH = 10
MAX_FILES = 20
"""How many files an option may be made of."""


class Options:
    """The options that each group has."""

    def __init__(self, folder: str | None = None) -> None:
        self._folder = Path(folder or "").absolute()
        self._own: dict[str, list[str]] = {}
        self._sections: dict[tuple[str, str], type[Section]] = {}
        if folder is not None:
            require(self._folder.is_dir(), "--config-dir", "a folder", folder, "Name an existing folder.")
            self._own = {group: self._names_in(group) for group in GROUPS}

    def names(self, group: str) -> list[str]:
        """The options of a group that may be chosen, the default first."""
        named = [name for name in GROUPS.get(group, ()) if name != ITSELF]
        return [*named, *self._own.get(group, ())]

    def section(self, group: str, name: str) -> type[Section]:
        """The class of an option's keys. One of the user's own is read for it, and made known to Hydra."""
        if name in GROUPS[group]:
            return section_of(group, name)
        if (group, name) not in self._sections:
            self._sections[group, name] = self._load(group, name)
        return self._sections[group, name]

    def _names_in(self, group: str) -> list[str]:
        folder = self._folder / group
        try:
            paths = sorted(folder.iterdir()) if folder.is_dir() else []
        except OSError as error:
            raise _refusal(folder, f"folders that can be listed ({cause_of(error)})", "Fix their modes.") from None
        names = [path.stem for path in paths if path.suffix == ".yaml" and NAME.fullmatch(path.stem)]
        for name in names:
            # Hydra takes a name with the suffix for the same as one without.
            if name in GROUPS[group] or name.endswith(".yaml"):
                raise _refusal(folder / f"{name}.yaml", "options of new names", "Give the file another name.")
        return names

    def _load(self, group: str, name: str) -> type[Section]:
        path = self._folder / group / f"{name}.yaml"
        base, *parts = self._parts(path, group, [])
        layers = [part for part in parts if not isinstance(part, str)]
        if not isinstance(base, str) or len(layers) < len(parts):
            names = ", ".join(name for name in GROUPS[group] if name != ITSELF)
            rule = f"files whose first default, and no other, is an option of the package ({names})"
            raise _refusal(path, rule, f"Begin it with defaults: [{next(iter(GROUPS[group]))}].")
        section = section_of(group, base)
        sections = sections_with({group: section})
        tree = OmegaConf.create({group: OmegaConf.structured(GROUPS[group][base])})
        for layer in layers:
            for key, value in keys_in(layer):
                shown = f"{str(value)[:40]} in {path}"
                check_value(key, value, sections, shown, shown)
            try:
                tree.merge_with(layer)
            except OmegaConfBaseException as error:
                raise _refusal(path, f"values that fit ({words_of(error)})", "See --help.") from None
        ConfigStore.instance().store(group=group, name=name, node=tree, package="_global_", **REPLACE)
        return section

    def _parts(self, path: Path, group: str, read: list[Path]) -> Iterator[str | dict[str, Any]]:
        """The layers of an option, in the order of its defaults: names of the package's options and files' values."""
        if path in read or len(read) == MAX_FILES:
            raise _refusal(path, f"options of at most {MAX_FILES} files, each named once", "Shorten its defaults.")
        read.append(path)
        text = _text_of(path, self._folder)
        values = _values_of(path, text)
        defaults = values.pop("defaults", [])
        if "_self_" not in defaults:
            defaults = [*defaults, "_self_"]
        for entry in defaults:
            if entry == "_self_":
                yield values if _is_global(path, text) else {group: values}
                continue
            target = self._folder / entry[1:] if entry.startswith("/") else path.parent / entry
            inside = target.parent in (self._folder, self._folder / group) and NAME.fullmatch(target.name)
            if not inside:
                raise _refusal(path, f"defaults of {group} or of the folder itself", f"Leave {entry!r} out.")
            if target.parent == self._folder / group and target.name in GROUPS[group]:
                yield target.name
            else:
                yield from self._parts(target.with_name(f"{target.name}.yaml"), group, read)


def _text_of(path: Path, folder: Path) -> str:
    """The text of a regular file of a folder, to which links may lead that do not leave the folder."""
    rule = f"regular files of at most {MAX_BYTES:,} bytes, without links that leave it"
    try:
        if path.is_file() and path.resolve().is_relative_to(folder.resolve()):
            with path.open("rb") as file:
                content = file.read(MAX_BYTES + 1)
            if len(content) <= MAX_BYTES:
                return content.decode()
    except (OSError, ValueError) as error:
        rule = f"readable files ({cause_of(error)})"
    raise _refusal(path, rule, "Fix the file.")


def _values_of(path: Path, text: str) -> dict[Any, Any]:
    """The mapping that a YAML text holds, once it is known to be small as a tree as well."""
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            ok = depth <= MAX_DEPTH and not isinstance(event, yaml.AliasEvent)
            if not ok or count_brackets(getattr(event, "value", "")) > MAX_BRACKETS:
                rule = f"YAML without aliases, nested at most {MAX_DEPTH} deep"
                raise _refusal(path, rule, "Write its values out.")
        values = OmegaConf.to_container(OmegaConf.create(text))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise _refusal(path, f"readable YAML ({words_of(error)})", "Fix it.") from None
    defaults = values.get("defaults", []) if isinstance(values, dict) else None
    if not isinstance(values, dict) or not isinstance(defaults, list) or {type(entry) for entry in defaults} - {str}:
        raise _refusal(path, "keys with values, whose defaults are a list of names", "Write KEY: VALUE.")
    return values


def _is_global(path: Path, text: str) -> bool:
    """Tell a file whose keys begin at the top (`# @package _global_`) from one that has those of its group."""
    head = takewhile(lambda line: not line.strip() or line.lstrip().startswith("#"), text.splitlines())
    packages = {match[1] for line in head if (match := PACKAGE.fullmatch(line))}
    if not packages <= {"_global_", "_group_"}:
        raise _refusal(path, "files of the package _global_ or of none", "Leave its @package out.")
    return "_global_" in packages


def _refusal(path: Path, rule: str, remedy: str) -> UsageError:
    return UsageError(f"--config-dir must hold {rule}, got {str(path)!r}. {remedy}")
