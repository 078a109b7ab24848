"""The schema as Hydra and `--help` know it: registered groups, and every key with its documentation."""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import MISSING as MISSING_DEFAULT
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, NamedTuple, get_args

from hydra.conf import HelpConf
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from mgpu_ddp.config.schema import GROUPS, Config


def register() -> None:
    """Put the schema into Hydra's ConfigStore."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, options in GROUPS.items():
        for name, node in options.items():
            store.store(group=group, name=name, node=node)
    store.store(group="hydra/help", name="mgpu_ddp", node=HelpConf(app_name="mgpu_ddp", template=help_text()))


class Key(NamedTuple):
    """What `--help` and error lines say about a key."""

    default: Any
    kind: str
    doc: str
    option: str | None = None
    """The choice within its group that it belongs to."""


KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "text", NoneType: "null"}


def documented_keys() -> dict[str, Key]:
    """Every key of the command line, in the order of the schema."""
    keys: dict[str, Key] = {}
    for name, key in _keys_of(Config, ""):
        if name in keys:
            # Options of one group may give a key of theirs the same name.
            first = keys[name]
            if first.doc.endswith(key.doc):
                continue
            doc = first.doc if first.option is None else f"{first.option}: {first.doc}"
            key = first._replace(option=None, doc=f"{doc} {key.option}: {key.doc}")
        keys[name] = key
    return keys


def _keys_of(schema: Any, prefix: str) -> Iterator[tuple[str, Key]]:
    docs: dict[str, str] = {}
    for parent in reversed(schema.__mro__[:-1]):
        docs |= _docs_of(parent)
    for item in fields(schema):
        name = f"{prefix}{item.name}"
        if schema is Config and item.name in GROUPS:
            options = {o if inspect.isclass(o) else type(o): choice for choice, o in GROUPS[item.name].items()}
            yield name, Key(next(iter(GROUPS[item.name])), f"one of {', '.join(GROUPS[item.name])}", docs[item.name])
            for option, choice in options.items():
                for key, value in _keys_of(option, f"{name}."):
                    if key != "data.name":
                        yield key, value._replace(option=choice)
        elif is_dataclass(item.type):
            yield from _keys_of(item.type, f"{name}.")
        else:
            default = item.default_factory() if item.default_factory is not MISSING_DEFAULT else item.default
            kinds = get_args(item.type) if isinstance(item.type, UnionType) else (item.type,)
            yield name, Key(default, " or ".join(KINDS.get(kind, "a list") for kind in kinds), docs[item.name])


def _docs_of(schema: Any) -> dict[str, str]:
    """What stands under the fields of a class."""
    tree = ast.parse(inspect.getsource(schema)).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs: dict[str, str] = {}
    for statement, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr):
            assert isinstance(statement.target, ast.Name)
            docs[statement.target.id] = " ".join(ast.literal_eval(after.value).split())
    return docs


def help_text() -> str:
    lines = [
        "Predict every image of a dataset, on every GPU: one row per image, exactly once.",
        "",
        "  torchrun --standalone --nproc_per_node=4 -m mgpu_ddp.infer [key=value ...] [--multirun]",
        "  mgpu-infer [key=value ...]                  one process per GPU, started for you",
        "  python -m mgpu_ddp.infer [key=value ...]    one process",
        "",
        "  --multirun batch_size=32,64                 a job for each point, and a table of them",
        "  +sweep=batch_size                           the same for 16 to 1024, three times each",
        "  hydra/launcher=torchrun                     each job of a sweep apart; slurm: in an allocation of its own",
        "  hydra/sweeper=optuna                        draws the points (pip install hydra-optuna-sweeper)",
        "",
    ]
    for name, key in documented_keys().items():
        default = "null" if key.default is None else "required" if key.default is MISSING else key.default
        shown = str(default).replace("'", "").replace("True", "true").replace("False", "false")
        lines += [f"{name}  ({shown})", f"    {key.doc}"]
    lines += ["", "--cfg job prints the composed configuration."]
    # Hydra runs the text through string.Template, which reads $ as its own.
    return "\n".join(lines).replace("$", "$$")
