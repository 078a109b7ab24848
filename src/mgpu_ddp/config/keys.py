"""Fields that hold a key's default, documentation and rule together, and the checks that run over them.

Knows no key by name: those are in `schema`.
"""

import os
import re
from collections.abc import Callable
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, ClassVar, TypeVar, cast, get_args

from mgpu_ddp.config.checks import PROTOCOLS, protocol_of, require

T = TypeVar("T")
Rule = Callable[["Key", Any], Any]
"""Returns the value as it is to be kept. Raises `UsageError` for one that breaks it."""

KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    NoneType: "null",
    Any: "the name of an option",
    list[int]: "a list of integers",
    list[str]: "a list of texts",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """A key of the command line."""

    name: str
    """As it is typed: data.size."""
    default: Any
    kinds: tuple[Any, ...]
    """The types its values may have."""
    doc: str
    rule: Rule | None = None
    path: bool = False
    """Its value is a path or a URL, which is taken as it is typed."""

    @property
    def kind(self) -> str:
        """Its types in words."""
        return " or ".join(KINDS[kind] for kind in self.kinds)

    def require(self, ok: bool, rule: str, value: object, remedy: str = "") -> None:
        """Raise the line that tells of a broken rule, unless `ok`. The remedy is the default, where none is given."""
        require(ok, self.name, rule, value, remedy or f"Try {self.name}={self.default}.")


def key(default: T, doc: str, rule: Rule | None = None, *, path: bool = False) -> T:
    """Make the field of a section: its default, its documentation and what its value must be."""
    metadata = {"doc": doc, "rule": rule, "path": path}
    if isinstance(default, list):
        return cast(T, field(default_factory=default.copy, metadata=metadata))
    return field(default=default, metadata=metadata)


class Section:
    """Keys that stand together. One that is built has values that keep their rules."""

    __slots__ = ()
    prefix: ClassVar[str] = ""
    """Precedes the names of its fields on the command line."""

    def __post_init__(self) -> None:
        for name, known in keys_of(type(self)).items():
            if known.rule is not None:
                setattr(self, name, known.rule(known, getattr(self, name)))
        self.check_together()

    def check_together(self) -> None:
        """Check the rules that span several keys, each of which keeps its own."""


def keys_of(section: Any) -> dict[str, Key]:
    """The keys of a subclass of `Section`, by the names of their fields."""
    keys = {}
    for item in fields(section):
        if "doc" in item.metadata:
            keys[item.name] = Key(
                name=section.prefix + item.name,
                default=item.default if item.default_factory is NO_DEFAULT else item.default_factory(),
                kinds=get_args(item.type) if isinstance(item.type, UnionType) else (item.type,),
                **item.metadata,
            )
    return keys


def one_of(*choices: str) -> Rule:
    """One of some words."""

    def check(key: Key, value: Any) -> Any:
        key.require(value in choices, f"one of {', '.join(choices)}", value)
        return value

    return check


def each_of(*choices: str) -> Rule:
    """A list of some of these words."""

    def check(key: Key, values: Any) -> Any:
        for value in values:
            key.require(value in choices, f"one of {', '.join(choices)}", value, f"Try {key.name}=[{choices[0]}].")
        return values

    return check


def at_least(low: float, *, high: float = 2**63 - 1, word: str | None = None, example: object = None) -> Rule:
    """A number from `low` to `high`, or the word, or None where the field allows it."""

    def check(key: Key, value: Any) -> Any:
        if value is None or (word is not None and value == word):
            return value
        remedy = "" if example is None else f"Try {key.name}={example}."
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        key.require(not (is_number and value > high), f"at most {high}", value, remedy)
        # NaN is not at least anything.
        key.require(is_number and value >= low, f"at least {low}" + (f" or {word}" if word else ""), value, remedy)
        return value

    return check


def not_empty(rule: str, remedy: str) -> Rule:
    """Any text but the empty one."""

    def check(key: Key, value: Any) -> Any:
        key.require(value != "", rule, value, remedy)
        return value

    return check


def location(rule: str, remedy: str) -> Rule:
    """A path or a URL."""

    def check(key: Key, value: Any) -> Any:
        key.require(bool(value), rule, value, remedy)
        return absolute(key, value)

    return check


def absolute(key: Key, value: str) -> str:
    """Make a path absolute and check a URL: however it is written, a start that continues finds the same one."""
    protocol = protocol_of(value)
    if not protocol:
        return os.path.abspath(os.path.expanduser(value))
    key.require(protocol in PROTOCOLS, f"a path or a URL of {', '.join(PROTOCOLS)}", value, "Copy or mount it.")
    has_secrets = re.search("://[^/]*@", value) or (protocol in ("http", "https") and "?" in value)
    rule = "a URL without user, password or query, since it will stand in the manifest"
    key.require(not has_secrets, rule, f"{protocol}://...", "Leave credentials to the environment.")
    return value.rstrip("/")
