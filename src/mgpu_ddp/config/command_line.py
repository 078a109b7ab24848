"""From what the user typed to a command that is safe to run, before Hydra acts on it.

In this order: paths are taken as typed (`paths`), no flag or override can run code (`allowlist`), each one fits the
schema (`overrides`), and so do the files of a config folder that they choose (`options`), and all compose (`compose`).
A mistake becomes one line in this package's words.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mgpu_ddp.config.allowlist import parse, split
from mgpu_ddp.config.checks import require
from mgpu_ddp.config.compose import compose_config, explain, quote
from mgpu_ddp.config.options import Options
from mgpu_ddp.config.overrides import check_number_of_jobs, check_point, lines_of, points_of, values_of
from mgpu_ddp.config.paths import as_typed
from mgpu_ddp.config.schema import SweepConfig, to_config
from mgpu_ddp.errors import UsageError

INFORMATIONAL = {"-h", "--hydra-help", "--version", "-i", "-sc", "-c"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A checked command line."""

    words: list[str]
    """As typed, but flags first, as argparse wants them, and without the config folder, which Hydra is not to read."""
    config_dir: str | None = None
    """The folder of the user's own options."""
    informational: bool = False
    multirun: bool = False
    swept: tuple[str, ...] = ()
    """Keys whose values a sweep varies."""
    stop_on_oom: bool = False
    isolated: bool = False
    """Each job gets a launcher of its own."""
    folder: str = ""
    """The run or sweep folder: a restart finds the one that its launch began in."""
    dry_run: bool = False
    """Nothing is made, not even the folder."""

    @property
    def argv(self) -> list[str]:
        """The arguments for Hydra."""
        # Hydra makes the folder that it is given.
        folder = os.curdir if self.dry_run else self.folder
        pinned = [f"hydra.{'sweep' if self.multirun else 'run'}.dir={quote(folder)}"] if self.folder else []
        return [*self.words, *pinned]


def check_command(argv: Sequence[str]) -> Command:
    """Read, check and compose the command line. Rank 0 only.

    Raises:
        UsageError: an unknown key or value, or anything that could run code.
    """
    try:
        return _check(argv)
    except OmegaConfBaseException as error:
        # What refers to something else is known only when it is resolved.
        raise UsageError(explain(error)) from None


def _check(argv: Sequence[str]) -> Command:
    flags, words = split(argv)
    sweeps = "-m" in flags or any(word.startswith("+sweep=") for word in words)
    words = [as_typed(word, sweeps=sweeps) for word in words]
    overrides = parse(words)
    config_dir = flags.pop("-cd", None)
    options = Options(config_dir)
    # Of a sweep: a key may belong to a swept choice of its group.
    first = next(points_of(overrides, options))
    check_point(first, options)
    typed = [part for flag, value in flags.items() for part in (flag, value) if part is not None]
    config_dir = config_dir and str(Path(config_dir).absolute())
    informational = not INFORMATIONAL.isdisjoint(flags)
    asked = Command(words=[*typed, *words], config_dir=config_dir, informational=informational)
    if asked.informational and "-c" not in flags:
        return asked

    cfg = compose_config(lines_of(first))
    multirun = "-m" in flags or cfg.hydra.mode == RunMode.MULTIRUN
    for override in overrides:
        ok = multirun or not override.is_sweep_override()
        remedy = "Add --multirun to sweep, [] for a list, or quotes."
        require(ok, override.key_or_group, "one value", override.input_line, remedy)
    if asked.informational:
        return asked
    # Hydra's own resolvers look there.
    HydraConfig.instance().set_config(cfg)
    if multirun:
        return _sweep(asked, cfg, typed, overrides, options)
    task = cfg.copy()
    OmegaConf.set_struct(task, False)
    del task["hydra"]
    return replace(asked, folder=_folder(cfg, "hydra.run.dir"), dry_run=to_config(task).dry_run)


def _folder(cfg: DictConfig, key: str) -> str:
    return str(Path(os.path.expanduser(str(OmegaConf.select(cfg, key)))).absolute())


def _sweep(asked: Command, cfg: DictConfig, flags: list[str], overrides: list[Override], options: Options) -> Command:
    """The command of a sweep, whose first dimension, and so the slowest, is the round."""
    # The last of a key counts, as where there is no sweep; a sweeper may see that otherwise.
    given = {override.key_or_group: override for override in overrides}
    of_file = cfg.hydra.sweeper.get("params") or {}
    params = [f"{key}={value}" for key, value in of_file.items() if key not in given]
    settings = SweepConfig(repeats=cfg.sweep.repeats, stop_on_oom=cfg.sweep.stop_on_oom)
    sweeper, launcher = (cfg.hydra.runtime.choices[f"hydra/{group}"] for group in ("sweeper", "launcher"))
    swept = [*parse(params), *given.values()]
    drawn = sweeper != "basic" and cfg.hydra.runtime.choices.get("hydra/sweeper/sampler") != "grid"
    trials = cfg.hydra.sweeper.n_trials if drawn else None
    check_number_of_jobs(swept, options, repeats=settings.repeats, trials=trials)
    _check_points(swept, options, draws=sweeper != "basic")
    _refuse_one_folder_for_all(cfg)

    words = [str(override.input_line) for override in given.values()]
    if sweeper == "basic":
        # Hydra itself would put the dimensions of a file before the round.
        words = ["hydra.sweeper.params=null", f"sweep.repeat=range(1,{settings.repeats + 1})", *params, *words]
    else:
        rule = f"1 with hydra/sweeper={sweeper}, which draws its own points"
        require(settings.repeats == 1, "sweep.repeats", rule, settings.repeats, "Leave it out.")
        if "hydra.sweeper.direction" not in given:
            # The objective is images/s.
            words = [*words, "hydra.sweeper.direction=maximize"]
    return replace(
        asked,
        words=[*flags, *words],
        multirun=True,
        swept=tuple(override.key_or_group for override in swept if override.is_sweep_override()),
        stop_on_oom=settings.stop_on_oom,
        isolated=launcher != "basic",
        folder=_folder(cfg, "hydra.sweep.dir"),
    )


def _check_points(overrides: list[Override], options: Options, *, draws: bool) -> None:
    """Check every value of every dimension, before the first job starts: `draws` is a sweeper that takes ranges."""
    for override in overrides:
        key, values = override.key_or_group, values_of(override, options)
        drawn = draws and override.is_sweep_override() and not override.is_discrete_sweep()
        ok = (bool(values) or drawn) and all(value.get_value_string() for value in values)
        require(ok, key, "a value or a list of values", override.input_line, f"Give {key}=A,B.")
    for point in points_of(overrides, options):
        check_point(point, options)


def _refuse_one_folder_for_all(cfg: DictConfig) -> None:
    folder = OmegaConf.to_container(cfg.output, resolve=False)["dir"]  # type: ignore[index, call-overload]
    remedy = "Leave it out: hydra.sweep.dir=DIR is the folder of the whole sweep."
    require(folder is None or "${" in folder, "output.dir", "a folder for each job of a sweep", folder, remedy)
