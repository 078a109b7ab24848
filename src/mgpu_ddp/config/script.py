"""The functions that a user's script brings to its jobs, to build its model, transform and dataset."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mgpu_ddp.config.checks import require

if TYPE_CHECKING:
    from torch import nn

ITSELF = "script"
"""The option of the groups `model`, `transform` and `data` that stands for what the script brings."""
KEPT = ("model.class_names",)
"""Keys of these groups that say something of what the script brings."""
CHECKPOINTS = (".pt", ".pth", ".pth.tar", ".ckpt", ".bin", ".safetensors")
THIS_PACKAGE = ("-m", "mgpu_ddp.infer")


def way_of_file(name: str) -> str | None:
    """How a file is used that was given for the name of a model; None where it is no file's name."""
    if name.endswith(".py"):
        return f"Start it as a script that calls mgpu_ddp.main: mgpu-infer {name} (docs/own.md)."
    return f"Give it as model.weights={name}." if name.endswith(CHECKPOINTS) else None


def name_of(thing: Any) -> str:
    """A class or function by its qualified name; an object by its own description, where that tells it from others."""
    if hasattr(thing, "__qualname__"):
        return f"{thing.__module__}.{thing.__qualname__}"
    described = " ".join(repr(thing).split())
    return f"{type(thing).__module__}.{type(thing).__qualname__}" if " at 0x" in described else described


@dataclass(frozen=True, kw_only=True, slots=True)
class Script:
    """Functions of the user's, each None where the configuration says it instead."""

    model: "Callable[[], nn.Module] | None" = None
    transform: Callable[[], Any] | None = None
    """Gives `(PIL.Image) -> Tensor (3, H, W)`, or a classification preset of torchvision's."""
    dataset: Callable[[], Any] | None = None
    """Gives a map-style Dataset."""
    outputs: Callable[[Any], Any] | None = None
    """The outputs of forward → a Tensor of logits, a dict of Tensors, or a list of dicts of Tensors."""
    version: str = ""
    start: tuple[str, ...] = THIS_PACKAGE
    """Arguments of the interpreter that start the script again, in processes of its own."""

    def with_options(self, argv: Sequence[str]) -> list[str]:
        """The command line with the options that stand for what the script brings.

        Raises:
            UsageError: it chooses another option for one of these.
        """
        words = list(argv)
        for group, brought in (("model", self.model), ("transform", self.transform), ("data", self.dataset)):
            if brought is None:
                continue
            for word in argv:
                key = word.lstrip("+").partition("=")[0]
                is_groups = key.partition(".")[0] == group and word != f"{group}={ITSELF}" and key not in KEPT
                require(not is_groups, key, f"left out where the script brings its {group}", word, "Leave it out.")
            if f"{group}={ITSELF}" not in argv:
                words.append(f"{group}={ITSELF}")
        return words
