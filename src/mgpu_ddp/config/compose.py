"""The configuration as Hydra composes it, with this package's schema and resolvers."""

import re
import secrets
from collections.abc import Sequence
from typing import Any

import hydra
from hydra import compose, initialize_config_module
from hydra.conf import HelpConf
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mgpu_ddp.config.checks import words_of
from mgpu_ddp.config.help import help_text
from mgpu_ddp.config.schema import GROUPS, Config
from mgpu_ddp.errors import UsageError

IS_1_3 = hydra.__version__.startswith("1.3.")
"""Hydra 1.3, which comes with OmegaConf 2.3, warns of what later ones want, and they of what it wants."""
VERSION_BASE: dict[str, str] = {"version_base": "1.3"} if IS_1_3 else {}
REPLACE: dict[str, Any] = {} if IS_1_3 else {"replace": True}
"""For `ConfigStore.store`: a process may read the options of more than one folder."""
REGISTER_RESOLVER = "register_new_resolver" if IS_1_3 else "register_resolver"


def register() -> None:
    """Give Hydra the schema, the help text and the resolver `${run_dir:chosen,default}`."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, options in GROUPS.items():
        for name, node in options.items():
            store.store(group=group, name=name, node=node)
    store.store(group="hydra/help", name="mgpu_ddp", node=HelpConf(app_name="mgpu_ddp", template=help_text()))
    getattr(OmegaConf, REGISTER_RESOLVER)("run_dir", _run_dir, replace=True)


def _run_dir(chosen: str | None, default: str) -> str:
    """The chosen folder, else a fresh one."""
    # The suffix keeps two starts within one second apart.
    return str(chosen) if chosen is not None else f"{default}-{secrets.token_hex(3)}"


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """Compose checked overrides, with Hydra's own part.

    Raises:
        UsageError: they do not compose.
    """
    try:
        with initialize_config_module("mgpu_ddp.conf", **VERSION_BASE):
            return compose("config", overrides=list(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UsageError(explain(error)) from None


def explain(error: Exception) -> str:
    """Say in one line what Hydra refuses after all: in a file, for a key of its own, or of what a sweeper drew."""
    said = [words_of(cause) for cause in (error, error.__cause__) if cause is not None]
    if said[-1] in said[0]:
        said = said[:1]
    return f"Hydra refuses the configuration: {': '.join(said)}. See --help."


def quote(value: str, *, interpolates: bool = False) -> str:
    """Quote a string for Hydra's override grammar. One that `interpolates` may refer to other values by ${...}."""
    # Inside quotes a backslash is itself, but for those that stand before a quote.
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value)
    # OmegaConf reads ${ as its own unless it is escaped, and then backslashes before it as well.
    escaped = escaped if interpolates else re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", escaped)
    return f"'{escaped}'"
