"""Overrides checked against the schema, before Hydra composes: a key that exists, an option, a value of its kind."""

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from importlib.util import find_spec
from itertools import islice
from math import ceil, prod

from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, RangeSweep, Sweep

from mgpu_ddp.config.allowlist import OPEN_GROUPS, OPEN_KEYS, parse
from mgpu_ddp.config.checks import require
from mgpu_ddp.config.options import Options
from mgpu_ddp.config.schema import GROUPS
from mgpu_ddp.config.script import ITSELF, way_of_file
from mgpu_ddp.config.values import check_value, find_key, sections_with

MAX_JOBS = 10_000
"""Jobs of a sweep. Hydra makes and composes all of them before the first one starts."""
MAX_CHECKED = 100
"""Values of a swept key that are checked before its sweep begins."""
PLUGINS = {"optuna": "hydra_optuna_sweeper"}
"""Sweepers that are not Hydra's own, with their packages."""


def points_of(overrides: Sequence[Override], options: Options) -> Iterator[list[Override]]:
    """The first point of a sweep, then that point with each other value of each key.

    A range that a sweeper draws from stands in every point as it is, and a line that sweeps nothing is its only point.
    """
    values = [values_of(override, options) or [override] for override in overrides]
    first = [words[0] for words in values]
    yield first
    for place, words in enumerate(values):
        for word in words[1:]:
            yield [*first[:place], word, *first[place + 1 :]]


def values_of(override: Override, options: Options) -> list[Override]:
    """An override for each different value that this one sweeps; none for a range that a sweeper draws from.

    All options of a group, because some are files, which are read here; of other keys the first `MAX_CHECKED` values.
    """
    if not override.is_sweep_override():
        return [override]
    if not override.is_discrete_sweep() or not _count(override, options):
        return []
    group, value = override.key_or_group, override.value()
    values: Iterable[str]
    if isinstance(value, Glob):
        values = value.filter(options.names(group))
    elif isinstance(value, RangeSweep):
        # Hydra's own iterator would first make a list of those that are to be shuffled.
        values = map(str, value.range())
    else:
        values = override.sweep_string_iterator()
    checked = dict.fromkeys(islice(values, MAX_JOBS if group in GROUPS else MAX_CHECKED))
    return parse([f"{override.get_key_element()}={value}" for value in checked])


def check_number_of_jobs(overrides: Sequence[Override], options: Options, *, repeats: int, trials: int | None) -> None:
    """Check that a sweep ends. `trials` are the jobs of a sweeper that draws its points, but makes lists to shuffle."""
    counts = {override.key_or_group: _count(override, options) for override in overrides}
    shuffled = [counts[word.key_or_group] for word in overrides if getattr(word.value(), "shuffle", False)]
    jobs = prod(counts.values()) * repeats if trials is None else max([trials, *shuffled])
    # Python writes no integer of thousands of digits.
    shown = f"{min(jobs, 10**18):,}"
    require(jobs <= MAX_JOBS, "--multirun", f"a sweep of at most {MAX_JOBS:,} jobs", shown, "Give fewer values.")


def _count(override: Override, options: Options) -> int:
    """How many values an override sweeps."""
    value, key, line = override.value(), override.key_or_group, override.input_line
    if isinstance(value, Glob):
        return len(value.filter(options.names(key)))
    if isinstance(value, ChoiceSweep):
        mixed = any(isinstance(item, Sweep) for item in value.list)
        require(not mixed, key, "a list of values or a range", line, "Give one of the two.")
        return len(value.list)
    if isinstance(value, RangeSweep):
        try:
            assert value.start is not None
            assert value.stop is not None
            return max(0, ceil((Fraction(value.stop) - Fraction(value.start)) / Fraction(value.step)))
        except (ArithmeticError, ValueError):
            require(False, key, "a range that ends", line, f"Give {key}=range(A,B).")
    return 1


def lines_of(point: Iterable[Override]) -> list[str]:
    """The overrides of a point as Hydra takes them."""
    return [str(override.input_line) for override in point if not override.is_sweep_override()]


def check_point(point: Sequence[Override], options: Options) -> None:
    """Check the overrides of one job.

    Raises:
        UsageError: an unknown key, option or kind of value, in one line.
    """
    chosen = {override.key_or_group: str(override.value()) for override in point}
    for override in point:
        if override.key_or_group in GROUPS:
            _check_option(override, options)
    names = {group: chosen.get(group, next(iter(GROUPS[group]))) for group in GROUPS}
    sections = sections_with({group: options.section(group, name) for group, name in names.items()})
    for override in point:
        key = override.key_or_group
        if key in GROUPS:
            continue
        if key in OPEN_GROUPS:
            _check_plugin(override, chosen)
        elif key.startswith("hydra."):
            _check_choice(override, OPEN_KEYS[key.removeprefix("hydra.")], chosen)
        elif override.is_sweep_override():
            find_key(key, sections, str(override.input_line))
        elif key != "sweep":
            check_value(key, override.value(), sections, str(override.input_line), override.get_value_string())


def _check_option(override: Override, options: Options) -> None:
    group, value = override.key_or_group, str(override.value())
    if value == ITSELF:
        # The script has put it there, or the job says that there is none.
        return
    known = options.names(group)
    remedy = "See --help."
    if group == "model":
        remedy = way_of_file(value) or f"Choose it by model.name={value}; timm's models also take model=timm."
    if (group, value) == ("model", "exported"):
        remedy = "To load an exported program is to run code that its file holds: give a checkpoint instead."
    require(value in known, group, f"one of {', '.join(known)}", value, remedy)
    is_plain = not (override.is_add() or override.is_force_add())
    require(is_plain, group, "chosen without +", override.input_line, f"Write {group}={value}.")
    options.section(group, value)


def _check_plugin(override: Override, chosen: dict[str, str]) -> None:
    group, value = override.key_or_group, str(override.value())
    package = PLUGINS.get(value, "")
    installed = not package or find_spec(f"hydra_plugins.{package}") is not None
    require(installed, group, "installed", value, f"Install its plugin (pip install {package.replace('_', '-')}).")
    if group == "hydra/sweeper/sampler":
        _check_choice(override, "hydra/sweeper=optuna", chosen)


def _check_choice(override: Override, needed: str, chosen: dict[str, str]) -> None:
    """Check that a choice, such as hydra/launcher=slurm, was made that a key is for."""
    group, _, option = needed.partition("=")
    made = not needed or chosen.get(group) == option
    require(made, override.key_or_group, f"given with {needed}", override.input_line, f"Add {needed}.")
