"""Paths and URLs as users type them → words in Hydra's grammar, which has a meaning for , = ( ' ~ and many more."""

import re
from functools import cache

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException

from mgpu_ddp.config.checks import MAX_BRACKETS, count_brackets
from mgpu_ddp.config.compose import quote
from mgpu_ddp.config.help import documented_keys

HYDRAS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")
"""Hydra's own keys whose values are paths. No sweep varies them."""
ESCAPE = re.compile(r"\\[\\()\[\]{}:=, \t]")
CHOICE = re.compile(r"""\s*(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")\s*(?=,|$)|(?:\$?\{[^{}]*\}|\\,|[^,])*""", re.DOTALL)
"""A value of a sweep: one that is quoted as Hydra has it, or text in which commas are escaped or stand in braces."""


@cache
def path_keys() -> frozenset[str]:
    """The keys whose values are paths or URLs."""
    return frozenset({*HYDRAS, *(name for name, key in documented_keys().items() if key.path)})


def as_typed(word: str, *, sweeps: bool) -> str:
    """Quote the value of an override that is a path or a URL; other words stay as they are.

    So do values that are already quoted or escaped as Hydra has it, null, and those that refer to others by ${...}.
    In a sweep a comma separates values.
    """
    key, equals, text = word.partition("=")
    if not equals or key.lstrip("+") not in path_keys():
        return word
    if not sweeps or key in HYDRAS:
        return f"{key}={_in_grammar(text)}"
    read = _read(text)
    if read is not None and read.is_sweep_override() and not _lists_values(read):
        return word
    return f"{key}={','.join(map(_in_grammar, _choices(text)))}"


def to_type(path: str) -> str:
    """An absolute path as it has to be typed to be taken for itself."""
    return quote(path) if "${" in path or ESCAPE.search(path) else path


def _in_grammar(text: str) -> str:
    read = _read(text)
    value = None if read is None else read.value()
    is_hydras = text.lstrip()[:1] in ("'", '"') or ESCAPE.search(text) or "${" in text
    if read is not None and (value is None or (isinstance(value, str) and (value == text or is_hydras))):
        return text
    return quote(text, interpolates="${" in text)


def _read(text: str) -> Override | None:
    """Read a value by Hydra's grammar; None where that has none for it."""
    if count_brackets(text) > MAX_BRACKETS:
        return None
    try:
        return OverridesParser.create().parse_override(f"path={text}")
    except (HydraException, ValueError):
        return None


def _lists_values(read: Override) -> bool:
    """Tell A,B from choice(A,B), range(A,B) and others that are called."""
    value = read.value()
    return isinstance(value, ChoiceSweep) and value.simple_form


def _choices(text: str) -> list[str]:
    """Split A,B,C."""
    found, place = list[str](), 0
    while True:
        match = CHOICE.match(text, place)
        assert match is not None
        found.append(match[0])
        if match.end() == len(text):
            return found
        place = match.end() + 1
