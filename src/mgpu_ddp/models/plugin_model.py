"""Models that installed packages offer: functions under an entry-point group, by the names they are installed under."""

import inspect
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from torch import nn

from mgpu_ddp.config.checks import require
from mgpu_ddp.config.schema import AUTO, Config
from mgpu_ddp.config.script import Script
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import PLUGINS, UsageError, place_in_code

GROUP = "mgpu_ddp.models"
"""Its entry points are what a script passes as `model`, maybe with the attributes `transform` and `outputs`."""


def with_plugin(script: Script, config: Config, world: World) -> Script:
    """What `model=plugin` brings, and besides it what the script brings. Collective: every rank calls this.

    Raises:
        UsageError: no package offers it, two do, it cannot be loaded, or ranks have different packages.
    """
    name = config.model.name
    with world.together("find the plugin"):
        entry, package = find_plugin(name)
    for rank, other in enumerate(world.exchange("plugin", package)):
        rule, found = "of one package on all ranks", f"{package} on rank {world.rank} and {other} on rank {rank}"
        require(other == package, f"model.name={name}", rule, found, "Install the same version everywhere.")
    with world.together("load the plugin"):
        brought = load_plugin(entry, package)
        if config.transform.name != AUTO:
            brought["transform"] = None
        if brought["transform"] is not None:
            rule = f"left out where {package} brings the transform"
            for key, value in config.transform.given.items():
                require(False, f"transform.{key}", rule, value, "Leave it out, or add transform=imagenet.")
    # A script's own come first.
    merged = {key: getattr(script, key) or value for key, value in brought.items()}
    return replace(script, **merged, version=" ".join(filter(None, [package, script.version])))


def find_plugin(name: str) -> tuple[EntryPoint, str]:
    """The entry point of a name, and the package that has it, with its version.

    Raises:
        UsageError: there is none, or more than one.
    """
    offered: dict[str, dict[str, EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        assert entry.dist is not None
        offered.setdefault(entry.name, {})[f"{entry.dist.name} {entry.dist.version}"] = entry
    installed = ", ".join(sorted(offered)) or "none is"
    remedy = "Install the package that offers it, in this environment."
    require(name in offered, "model.name", f"a plugin that is installed ({installed})", name, remedy)
    packages = offered[name]
    rule = f"offered by one package, not by {' and '.join(sorted(packages))}"
    require(len(packages) == 1, "model.name", rule, name, "Leave only one of them.")
    ((package, entry),) = packages.items()
    return entry, package


def load_plugin(entry: EntryPoint, package: str) -> dict[str, Any]:
    """Import what a package offers: arguments of `mgpu_ddp.main` by name.

    Raises:
        UsageError: it cannot be imported, or is no function.
    """
    PLUGINS.add(entry.module.partition(".")[0])
    try:
        build = entry.load()
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"model.name={entry.name}: {entry.value} of {package} cannot be imported: {place_in_code(error)}. Fix the"
            " package, or install another version."
        ) from error
    brought = {"model": build}
    for key in ("transform", "outputs"):
        # A module's class may have methods of these names.
        brought[key] = None if inspect.isclass(build) else getattr(build, key, None)
    for key, function in brought.items():
        ok = (function is None and key != "model") or (callable(function) and not isinstance(function, nn.Module))
        rule = f"a function for its {key}, as mgpu_ddp.main takes it"
        require(ok, f"{entry.value} of {package}", rule, type(function).__name__, "Fix the package.")
    return brought
