"""The way to the model that was meant by a name that its family does not have."""

import difflib
import re
from collections.abc import Sequence

from mgpu_ddp.config.script import way_of_file

KINDS = {
    "detection": "detects objects: bring it by a script (examples/detector.py, docs/own.md).",
    "segmentation": "segments images: bring it by a script (docs/own.md).",
    "video": "takes videos: bring it by a script (docs/own.md).",
    "optical_flow": "finds motion: bring it by a script (docs/own.md).",
    "quantization": "is quantized: bring it by a script (docs/own.md).",
}
"""Purposes of torchvision's models that do not classify images, by their package."""


def way_from_torchvision(name: str) -> str:
    """Where to go with a name that is no classification model of torchvision's."""
    import torchvision

    if (way := way_of_file(name)) is not None:
        return way
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return f"For a repository of the Hugging Face hub add model=hf (model=hf model.name={name})."
    every, of_timm = torchvision.models.list_models(), timm_names()
    if name.partition(".")[0] in of_timm:
        return f"It is timm's: add model=timm (model=timm model.name={name})."
    near = _beginning(name, every) or _beginning(name, of_timm) or _alike(name, every) or _alike(name, of_timm)
    if near is None:
        return "docs/models.md says how to list them, and docs/own.md how a script brings its own."
    if near not in every:
        return f"Did you mean timm's {near}? Add model=timm model.name={near}."
    kind = kind_of(near)
    if kind is None:
        return f"Did you mean {near}?"
    return f"{'It' if near == name else near} {kind}"


def way_from_timm(name: str, names: Sequence[str]) -> str:
    """Where to go with a name that is none of these, which are timm's."""
    import torchvision

    if (way := way_of_file(name)) is not None:
        return way
    if name in torchvision.models.list_models():
        kind = kind_of(name)
        return "It is torchvision's: leave model=timm out." if kind is None else f"It {kind}"
    own = name.partition("/")[2] or name
    near = _beginning(own, names) or _alike(own, names)
    return f"Did you mean {near}?" if near else "timm.list_models() names them; a script brings its own (docs/own.md)."


def kind_of(name: str) -> str | None:
    """The purpose of a model of torchvision's that does not classify images, and the way to run it."""
    import torchvision

    return KINDS.get(torchvision.models.get_model_builder(name).__module__.split(".")[2])


def timm_names() -> list[str]:
    """The names of timm's models; none where it is not installed."""
    try:
        import timm
    except ImportError:
        return []
    return list(timm.list_models())


def _beginning(name: str, names: Sequence[str]) -> str | None:
    return next((other for other in names if other.startswith(name)), None)


def _alike(name: str, names: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, names, n=1)), None)
