"""Rules that several keys share, each broken in one line."""

import os
import re
from typing import Any

from mgpu_ddp.errors import UsageError

PROTOCOLS = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "https": "aiohttp", "http": "aiohttp"}
"""Of the URLs that images are read from, with the package that each takes."""


def require(ok: bool, key: str, rule: str, value: object, remedy: str) -> None:
    """Raise the one-line `UsageError` that every refused value gets, unless `ok`."""
    if not ok:
        raise UsageError(f"{key} must be {rule}, got {value!r}. {remedy}")


def one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, key, f"one of {', '.join(choices)}", value, f"Try {key}={choices[0]}.")


def at_least(
    key: str, value: Any, low: float, example: object, *, word: str | None = None, high: float = 2**63 - 1
) -> None:
    """Check a number up to `high` that may also be the word `word` (or None, where the field allows it)."""
    if value is None or (word is not None and value == word):
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    rule = f"at least {low}" + (f" or {word}" if word else "")
    if is_number and value > high:
        rule = f"at most {high}"
    require(is_number and low <= value <= high, key, rule, value, f"Try {key}={example}.")


def protocol_of(location: str) -> str:
    """What stands before :// in a URL; nothing in a path."""
    before, colon, _ = location.partition("://")
    return before if colon else ""


def location(key: str, value: str) -> str:
    """A path made absolute, or a URL as it is: however it is written, it names the same to a start that continues."""
    protocol = protocol_of(value)
    if not protocol:
        return os.path.abspath(os.path.expanduser(value))
    require(protocol in PROTOCOLS, key, f"a path or a URL of {', '.join(PROTOCOLS)}", value, "Copy or mount it.")
    has_secrets = re.search("://[^/]*@", value) or (protocol in ("http", "https") and "?" in value)
    rule = "a URL without user, password or query, since it will stand in the manifest"
    require(not has_secrets, key, rule, f"{protocol}://...", "Leave credentials to the environment.")
    return value.rstrip("/")
