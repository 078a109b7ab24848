"""Jinja2 templates → a page in one file, which asks for nothing from outside and runs one script, of `templates`.

Autoescaping is on, and whatever is not markup is also cleaned of unprintable characters. Templates join markup and text
by writing them side by side, never with `~`, which would skip that cleaning.
"""

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgpu_ddp.errors import plural
from mgpu_ddp.reporting.text import duration, gibibytes

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
MAX_TEXT = 300
"""Characters of a text from outside: its middle is left out."""


def render(template: str, **values: object) -> str:
    """Fill in one of the templates beside this file."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> "Environment":
    # Imported here: a job writes its page once, at its end.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name, file in (("style", "style.css"), ("script", "filter.js")):
        text = (TEMPLATES / file).read_text()
        environment.globals[name] = Markup(text)
        environment.globals[f"{name}_sha256"] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    environment.filters |= {
        "count": "{:,}".format,
        "rate": "{:,.1f}".format,
        "percent": "{:.2%}".format,
        "duration": duration,
        "gibibytes": gibibytes,
        "plural": plural,
        "shorten": shorten,
    }
    return environment


def _printable(value: Any) -> Any:
    """Clean a value on its way into a page, unless it is markup already.

    Controls and lone surrogates have no place in HTML, and marks of direction would turn around what follows.
    """
    if hasattr(value, "__html__"):
        return value
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))


def shorten(value: object) -> str:
    text, half = str(value), MAX_TEXT // 2
    return text if len(text) <= MAX_TEXT else f"{text[:half]} … {text[-half:]}"
