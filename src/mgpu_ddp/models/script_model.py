"""The module that the user's script builds."""

import inspect

import torch
from torch import nn

from mgpu_ddp.config.script import Script, name_of
from mgpu_ddp.errors import UsageError, place_in_code
from mgpu_ddp.models.model import Model


def build_script_model(script: Script, seed: int, plugin: str | None = None) -> Model:
    """Call the function of the script, or of the plugin of this name.

    Raises:
        UsageError: it raises, or returns no module.
    """
    if script.model is None:
        raise UsageError(
            "model must be one that is built here, got 'script'. Pass model= to mgpu_ddp.main in a script."
        )
    torch.manual_seed(seed)
    try:
        module = script.model()
    except (Exception, SystemExit) as error:
        raise UsageError(f"model: the function raised {place_in_code(error)}. Fix it and start again.") from error
    if inspect.isclass(module) or not isinstance(module, nn.Module):
        raise UsageError(
            f"model must be a function that returns an nn.Module, got {module!r:.100} from it. Return one."
        )
    kind, whose = name_of(type(module)), f"plugin {plugin}" if plugin else "script"
    return Model(
        module=module,
        num_classes=None,
        identity={
            "model.name": f"{whose.replace(' ', '/', 1)}/{kind}",
            "model.outputs": name_of(script.outputs) if script.outputs is not None else None,
            "model.version": script.version,
        },
        origin=f"{kind} of the {whose}",
        class_names=None,
        preset=None,
        outputs=script.outputs,
        is_tried=True,
    )
