"""Every message a user can see names the thing, says what is wrong, and what to do about it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import mgpu_ddp
from mgpu_ddp import errors

SOURCE = Path(mgpu_ddp.__file__).parent
LAUNCH = Path(__file__).parents[1] / "launch"
OURS = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
FOR_PEERS = {"PeerError", "PeerFailedError", "PeerLostError", "ProtocolError"}
"""Say what happened elsewhere; the cause and its remedy stand where it happened."""
VALUE = "\N{WHITE SQUARE}"
"""Stands in a message for a part that is known only when it is raised."""
WHAT_TO_DO = re.compile(
    r"(add|allow|ask|build|check|choose|complete|convert|copy|correct|delete|fetch|fix|free|give|install|join|leave|list|lower"
    r"|make|mount|move|name|number|pass|pip|put|quote|raise|rename|renew|rerun|restore|return|run|save|see|set|shorten|split|start"
    rf"|store|try|unpack|use|wait|write)\b|{VALUE}",
    re.IGNORECASE,
)
VAGUE = re.compile(r"(it|this|that|something|an? error|invalid|illegal|failed|cannot|could|unable)\b", re.IGNORECASE)
UNWANTED = re.compile(r"!|\b(mend|please|sorry|oops|for ever|sign of life|in vain|invalid|illegal)\b", re.IGNORECASE)


def text_of(node: ast.AST | None, known: dict[str, ast.AST]) -> str:
    """A literal as a user may read it, with VALUE for what is computed."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(text_of(part, known) for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return text_of(left, known) + text_of(right, known)
        case ast.FormattedValue(value=ast.Name() as name, conversion=-1) | (ast.Name() as name) if name.id in known:
            return text_of(known[name.id], {key: value for key, value in known.items() if key != name.id})
    return VALUE


def assigned(function: ast.AST) -> dict[str, ast.AST]:
    """The names that a function, or a module, gives one text and no other."""
    found: dict[str, list[ast.AST]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                names, values = [target], [node.value]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    names, values = target.elts, node.value.elts
                for name, value in zip(names, values, strict=False):
                    if isinstance(name, ast.Name):
                        found.setdefault(name.id, []).append(value)
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            found.setdefault(node.target.id, []).extend([node, node])
    return {name: values[0] for name, values in found.items() if len(values) == 1}


def messages(source: str) -> Iterator[tuple[int, str, str]]:
    """The line, the kind and the text of every error that Python source makes, and of what it logs."""
    module = ast.parse(source)
    seen: set[ast.Call] = set()
    functions = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)]
    # The innermost function of a call comes last in the walk, and knows its names best.
    for scope in [*reversed(functions), module]:
        known = assigned(module) | assigned(scope)
        for call in ast.walk(scope):
            if isinstance(call, ast.Call) and call not in seen:
                seen.add(call)
                for kind, text in _message(call, known):
                    yield call.lineno, kind, text


def _message(call: ast.Call, known: dict[str, ast.AST]) -> Iterator[tuple[str, str]]:
    texts = [text_of(argument, known) for argument in call.args]
    match call.func:
        case ast.Name(id="require") if len(texts) == 5:
            _, key, rule, value, remedy = texts
            yield "UsageError", f"{key} must be {rule}, got {value}. {remedy}"
        case ast.Attribute(attr="require") if len(texts) >= 3:
            rule, value, remedy = (*texts[1:], "Try the default.")[:3]
            yield "UsageError", f"{VALUE} must be {rule}, got {value}. {remedy}"
        case ast.Name(id=name) if name in OURS and texts:
            yield name, texts[0]
        case ast.Attribute(value=ast.Name(id="log"), attr=level) if texts:
            yield level, texts[0]


def faults(kind: str, text: str) -> list[str]:
    """The faults of a message."""
    found = [f"says {word.group()!r}" for word in UNWANTED.finditer(text)]
    if kind not in OURS or text == VALUE:
        return found
    if "\n" in text:
        found.append("is more than one line")
    if VAGUE.match(text):
        found.append("does not begin with the thing it is about")
    if kind in FOR_PEERS or text.endswith(VALUE):
        return found
    if not text.endswith("."):
        found.append("does not end with a full stop")
    *told, last = re.split(r"(?<=\.) (?=[A-Z`]|pip )", text)
    if not told:
        found.append("is one sentence, without what to do")
    elif not any(WHAT_TO_DO.match(clause) for clause in re.split(r"[:;] ", last)):
        found.append(f"does not say what to do, but {last!r}")
    return found


def test_every_message_names_the_thing_and_says_what_to_do() -> None:
    bad, count = [], 0
    for path in sorted(SOURCE.rglob("*.py")):
        for line, kind, text in messages(path.read_text()):
            count += kind in OURS
            bad += [f"{path.relative_to(SOURCE)}:{line} {fault}: {text}" for fault in faults(kind, text)]
    assert count > 120, "the walk has lost sight of the messages"
    assert not bad, "\n" + "\n".join(bad)


def test_every_message_of_the_launch_scripts_is_a_sentence() -> None:
    said = [text for path in LAUNCH.iterdir() for text in re.findall(r'fail "(.*)"$|fail "(.*?)"', path.read_text())]
    texts = [first or second for first, second in said]
    assert len(texts) >= 6
    assert not [text for text in texts if not text.endswith(".") or UNWANTED.search(text)]


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ('raise UsageError("data.root holds no image. Mend it.")', "says 'Mend'"),
        ('raise UsageError("data.root holds no image! Name another.")', "says '!'"),
        ('raise UsageError(f"{path} cannot be read.")', "is one sentence"),
        ('raise StateError(f"{path} cannot be read. Fix it")', "does not end with a full stop"),
        ('raise WriteError(f"{path} cannot be read. That happens.")', "does not say what to do"),
        ('raise UsageError("Cannot read the list. Fix it.")', "does not begin with the thing"),
        ('rule = "a folder"\nrequire(ok, "run", rule, folder, "A folder is needed.")', "does not say what to do"),
        (
            'def f():\n    rule, remedy = "a folder", "Oops."\n    require(ok, "run", rule, folder, remedy)',
            "says 'Oops'",
        ),
        ('log.warning("waited for ever")', "says 'for ever'"),
    ],
)
def test_a_message_that_does_not_is_found(code: str, fault: str) -> None:
    assert any(fault in found for _, kind, text in messages(code) for found in faults(kind, text))
