"""From what the user typed to a command that is safe to run, before Hydra acts on it.

In this order: no flag or override can run code (`allowlist`), each one fits the schema (`overrides`), and all compose
(`compose`). A mistake becomes one line in this package's words.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from mgpu_ddp.config.allowlist import parse, refuse_code_in_files, split
from mgpu_ddp.config.checks import require
from mgpu_ddp.config.compose import compose_config, quote
from mgpu_ddp.config.overrides import Options, check_point, lines_of, options_in, points_of, values_of
from mgpu_ddp.config.schema import GROUPS, SweepConfig, to_config

INFORMATIONAL = {"-h", "--hydra-help", "--version", "-i", "-sc", "-c"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A checked command line."""

    words: list[str]
    """As typed, but flags first: argparse wants overrides in one piece."""
    informational: bool = False
    multirun: bool = False
    swept: tuple[str, ...] = ()
    """Keys whose values a sweep varies."""
    stop_on_oom: bool = False
    isolated: bool = False
    """Each job gets a launcher of its own."""
    folder: str = ""
    """The run or sweep folder: a restart finds the one that its launch began in."""

    @property
    def argv(self) -> list[str]:
        """The arguments for Hydra."""
        pinned = [f"hydra.{'sweep' if self.multirun else 'run'}.dir={quote(self.folder)}"] if self.folder else []
        return [*self.words, *pinned]


def check_command(argv: Sequence[str]) -> Command:
    """Read, check and compose the command line. Rank 0 only.

    Raises:
        UsageError: an unknown key or value, or anything that could run code.
    """
    flags, words = split(argv)
    overrides = parse(words)
    config_dir = _config_dir(flags)
    own = options_in(config_dir) if config_dir else {}
    # Of a sweep: a key may belong to a swept choice of its group.
    first = next(points_of(overrides, own))
    check_point(first, own)
    typed = [part for flag, value in flags.items() for part in (flag, value) if part is not None]
    asked = Command(words=[*typed, *words], informational=not INFORMATIONAL.isdisjoint(flags))
    if asked.informational and "-c" not in flags:
        return asked

    cfg = compose_config(lines_of(first), config_dir)
    multirun = "-m" in flags or cfg.hydra.mode == RunMode.MULTIRUN
    for override in overrides:
        ok = multirun or not override.is_sweep_override()
        require(ok, override.key_or_group, "one value", override.input_line, "Add --multirun to sweep, or quote it.")
    if asked.informational:
        return asked
    # Hydra's own resolvers look there.
    HydraConfig.instance().set_config(cfg)
    if multirun:
        return _sweep(cfg, typed, overrides, config_dir, own)
    task = cfg.copy()
    OmegaConf.set_struct(task, False)
    del task["hydra"]
    to_config(task)
    return replace(asked, folder=_folder(cfg, "hydra.run.dir"))


def _config_dir(flags: dict[str, str | None]) -> Path | None:
    """The user's own folder of options, which no file of it may turn into code."""
    folder = flags.get("-cd")
    if folder is None:
        return None
    require(Path(folder).is_dir(), "--config-dir", "a folder", folder, "Name an existing folder.")
    refuse_code_in_files(Path(folder))
    return Path(folder)


def _folder(cfg: DictConfig, key: str) -> str:
    return str(Path(str(OmegaConf.select(cfg, key))).absolute())


def _sweep(
    cfg: DictConfig, flags: list[str], overrides: list[Override], config_dir: Path | None, own: Options
) -> Command:
    """The command of a sweep, whose first dimension, and so the slowest, is the round."""
    # The last of a key counts, as where there is no sweep; a sweeper may see that otherwise.
    given = {override.key_or_group: override for override in overrides}
    of_file = cfg.hydra.sweeper.get("params") or {}
    params = [f"{key}={value}" for key, value in of_file.items() if key not in given]
    settings = SweepConfig(repeats=cfg.sweep.repeats, stop_on_oom=cfg.sweep.stop_on_oom)
    sweeper, launcher = (cfg.hydra.runtime.choices[f"hydra/{group}"] for group in ("sweeper", "launcher"))
    swept = [*parse(params), *given.values()]
    _check_points(swept, config_dir, own, draws=sweeper != "basic")
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
    return Command(
        words=[*flags, *words],
        multirun=True,
        swept=tuple(override.key_or_group for override in swept if override.is_sweep_override()),
        stop_on_oom=settings.stop_on_oom,
        isolated=launcher != "basic",
        folder=_folder(cfg, "hydra.sweep.dir"),
    )


def _check_points(overrides: list[Override], config_dir: Path | None, own: Options, *, draws: bool) -> None:
    """Check every value of every dimension, before the first job starts: `draws` is a sweeper that takes ranges."""
    for override in overrides:
        key, values = override.key_or_group, values_of(override, own)
        drawn = draws and override.is_sweep_override() and not override.is_discrete_sweep()
        ok = (bool(values) or drawn) and all(value.get_value_string() for value in values)
        require(ok, key, "a value or a list of values", override.input_line, f"Give {key}=A,B.")
    composed: set[tuple[str, ...]] = set()
    for point in points_of(overrides, own):
        check_point(point, own)
        options = tuple(lines_of(override for override in point if override.key_or_group in GROUPS))
        if config_dir is not None and options not in composed:
            # What a file holds is known once it is composed.
            compose_config(lines_of(point), config_dir)
            composed.add(options)


def _refuse_one_folder_for_all(cfg: DictConfig) -> None:
    folder = OmegaConf.to_container(cfg.output, resolve=False)["dir"]  # type: ignore[index, call-overload]
    remedy = "Leave it out: hydra.sweep.dir=DIR is the folder of the whole sweep."
    require(folder is None or "${" in folder, "output.dir", "a folder for each job of a sweep", folder, remedy)
