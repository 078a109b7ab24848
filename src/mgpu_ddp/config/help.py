"""Every key with its documentation, and the text of `--help`."""

from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache

from omegaconf import MISSING

from mgpu_ddp.config.keys import Key, keys_of
from mgpu_ddp.config.schema import GROUPS, SECTIONS, Config, section_of

INTRODUCTION = """\
Predict every image of a dataset, on every GPU: one row per image, exactly once.

  torchrun --standalone --nproc_per_node=4 -m mgpu_ddp.infer [key=value ...] [--multirun]
  mgpu-infer [key=value ...]                  one process per GPU, started for you
  python -m mgpu_ddp.infer [key=value ...]    one process
  mgpu-infer mine.py [key=value ...]          a script that calls mgpu_ddp.main(model=...), under any of the three

  --config-dir DIR                            DIR/data/NAME.yaml is chosen by data=NAME, likewise model and transform
  --multirun batch_size=32,64                 a job for each point, and a table of them
  +sweep=batch_size                           the same for 16 to 1024, three times each
  hydra/launcher=torchrun                     each job of a sweep in processes of its own; slurm: in an allocation
  hydra/sweeper=optuna                        draws the points (pip install hydra-optuna-sweeper)
"""


@cache
def documented_keys() -> dict[str, Key]:
    """Every key of the command line, in the order of the schema."""
    keys: dict[str, Key] = {}
    for item in fields(Config):
        if item.name in SECTIONS:
            keys |= {key.name: key for key in keys_of(SECTIONS[item.name]).values()}
        elif item.name in GROUPS:
            default = next(iter(GROUPS[item.name]))
            keys[item.name] = replace(keys_of(Config)[item.name], default=default)
            keys |= {name: _together(options) for name, options in _options_of(item.name).items()}
        else:
            keys[item.name] = keys_of(Config)[item.name]
    return keys


def _options_of(group: str) -> dict[str, dict[str, Key]]:
    """Each key of a group as its options have it."""
    found: dict[str, dict[str, Key]] = {}
    for option in GROUPS[group]:
        for key in keys_of(section_of(group, option)).values():
            found.setdefault(key.name, {})[option] = key
    return found


def _together(options: dict[str, Key]) -> Key:
    """One key for all options of a group that have it, with all that they say of it."""
    first = next(iter(options.values()))
    docs: dict[str, str] = {}
    for option, key in options.items():
        docs.setdefault(key.doc, option)
    if len(docs) == 1:
        return first
    return replace(first, doc=" ".join(f"{option}: {doc}" for doc, option in docs.items()))


def _entries() -> Iterator[str]:
    for key in documented_keys().values():
        default = "null" if key.default is None else "required" if key.default is MISSING else key.default
        shown = str(default).replace("'", "").replace("True", "true").replace("False", "false")
        yield f"{key.name}  ({shown})\n    {key.doc}"


def help_text() -> str:
    text = "\n".join([INTRODUCTION, *_entries(), "", "--cfg job prints the composed configuration."])
    # Hydra runs the text through string.Template, which reads $ as its own.
    return text.replace("$", "$$")
