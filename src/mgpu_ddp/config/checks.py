"""The line that every refused value gets, and the protocols of URLs."""

from mgpu_ddp.errors import UsageError

PROTOCOLS = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "https": "aiohttp", "http": "aiohttp"}
"""Protocols that images are read by, with the package that each needs."""

MAX_BRACKETS = 50
"""How many brackets a text may open: parsers recurse where these nest, and Python ends that with a traceback."""


def require(ok: bool, key: str, rule: str, value: object, remedy: str) -> None:
    """Raise the one-line `UsageError` that every refused value gets, unless `ok`."""
    if not ok:
        raise UsageError(f"{key} must be {rule}, got {value!r}. {remedy}")


def count_brackets(text: str) -> int:
    """How many brackets a text opens."""
    return sum(map(text.count, "([{"))


def words_of(error: BaseException) -> str:
    """The message of an OmegaConf or Hydra error in one line, without the place, which OmegaConf adds to it."""
    return " ".join(str(error).partition("full_key:")[0].split()).rstrip(".")


def protocol_of(location: str) -> str:
    """The protocol of a URL; empty for a path."""
    before, colon, _ = location.partition("://")
    return before if colon else ""
