"""`mgpu_ddp.main`: the program, with what a script of the user's brings to it."""

import functools
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mgpu_ddp.config.script import THIS_PACKAGE, Script
from mgpu_ddp.errors import UsageError

if TYPE_CHECKING:
    from torch import nn


def main(
    *,
    model: "Callable[[], nn.Module] | None" = None,
    transform: Callable[[], Any] | None = None,
    dataset: Callable[[], Any] | None = None,
    outputs: Callable[[Any], Any] | None = None,
    version: str = "",
) -> dict[str, Any]:
    """Run the program on this process's command line, with a model, transform, dataset or columns of your own.

    Started by torchrun, `mgpu-infer`, srun, or alone. Returns in every rank once the job is complete, with the summary
    that its JSON line has (`mgpu_ddp.open(summary["run_dir"])` opens the folder); of a sweep, its last job's. Otherwise
    the process ends with the exit code that says how it went.

    `model` builds the module, in every rank; rank 0's weights reach the others. Its forward takes (B, 3, H, W), or what
    `dataset` yields, collated. `transform` gives a function `(PIL.Image) -> Tensor (3, H, W)`, or the `transforms()` of
    torchvision's classification weights, which leave decoding to the GPU. `dataset` gives a map-style Dataset whose
    items are images (PIL, uint8 array or Tensor H×W×3, encoded bytes, float Tensor 3×H×W) or dicts with `image` and
    any of `key`, `label` and scalars. `outputs` takes what forward returned, on the device, and returns a Tensor of
    logits (B, C), a dict of Tensors (B, ...) or a list of B dicts of Tensors. Another `version` is another job.
    """
    from mgpu_ddp import cli, infer

    functions = {"model": model, "transform": transform, "dataset": dataset, "outputs": outputs}
    try:
        check_functions(functions, version)
    except UsageError as mistake:
        if os.environ.get("RANK", "0") == "0":
            print(f"mgpu_ddp: {mistake}", file=sys.stderr)
        sys.exit(int(mistake.exit_code))
    # Each is asked once, however many jobs a sweep has. A model is not: a job uses its module up.
    once = functools.cache(dataset) if dataset is not None else None
    script = Script(
        model=model, transform=transform, dataset=once, outputs=outputs, version=version, start=words_that_start()
    )
    return cli.main(infer.infer, script)


def check_functions(functions: dict[str, Any], version: Any) -> None:
    """Check what a user has passed.

    Raises:
        UsageError: it is not a function that can be called, or the version is no text.
    """
    from torch import nn

    for name, function in functions.items():
        is_module = isinstance(function, nn.Module) and name != "outputs"
        if function is not None and (not callable(function) or is_module):
            raise UsageError(
                f"{name} must be a function, got {type(function).__name__}. Pass one that makes it: {name}=lambda: ..."
            )
    if not isinstance(version, str):
        raise UsageError(f"version must be text, got {version!r}. Write version={str(version)!r}.")


def words_that_start() -> tuple[str, ...]:
    """The interpreter's arguments that start the running program again."""
    module = sys.modules["__main__"]
    spec, file = getattr(module, "__spec__", None), getattr(module, "__file__", None)
    if spec is not None and spec.name not in ("__main__", "mgpu_ddp.infer"):
        return ("-m", spec.name.removesuffix(".__main__"))
    return THIS_PACKAGE if spec is not None or file is None else (os.path.abspath(file),)
