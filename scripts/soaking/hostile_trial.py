"""One hostile trial, and words and bytes that nobody should give."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.support.starting import Forks, ranks

WORDS = [
    *("-1", "0", "1", "3", "0.5", "1e400", "nan", "inf", "-inf", "2147483648", "9223372036854775808", "1_0", "0x1", ""),
    *("null", "~", "true", "'${oc.env:EVIL}'", "'${seed}'", "'${hydra:runtime.cwd}'", "'${oc.create:{a:1}}'", "???"),
    *("[]", "{}", "[1,2]", "[[[]]]", "{a:1}", "'${oc.decode:${oc.env:EVIL}}'", "'${model}'", "'${..}'", "'${'", "'\\'"),
    *("a\nb", "\x1b[2J", "\u202e", "a\tb", "\udcff", "é" * 200, "x" * 5000, "[" * 49, "'{0..9999999}'", "**/**/**"),
    *("/dev/zero", "/dev/full", "/proc/self/mem", "/proc/self/environ", "../mine/fifo", "../mine", "~root", "int(1)"),
    *("file:///etc/passwd", "http://127.0.0.1:1/x", "s3://u:p@x/y", "://", "pipe:touch marker", "glob(*)"),
]
"""Values that some key takes amiss, and that no job should stumble over."""


@dataclass(kw_only=True)
class Trial:
    """A command in a prepared folder, and what may come of it."""

    what: str
    """The kind of attack, in words."""
    command: Forks
    size: int = 1
    """How many things it tries."""
    leaves_nothing: bool = True
    """When refused. Sweeps make a folder before any job is refused, and a replacement is completed before."""
    environ: dict[str, str] = field(default_factory=dict)
    may_make: Callable[[str], bool] = lambda path: path.startswith("work/")
    may_change: Callable[[str], bool] = lambda path: False
    wrong: Callable[[int], str] = lambda code: ""
    """Given an exit code, say in what the table that the folder claims to hold is wrong."""


def job(rng: random.Random, *settings: str) -> Forks:
    """A job, on two ranks now and then."""
    return ranks(2 if rng.random() < 0.1 else 1, *settings)


def spoil(data: bytes, rng: random.Random) -> bytes:
    """Bytes of a real file with a few of them flipped, overwritten, cut out or put in, mostly near its ends."""
    content = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        end = len(content)
        place = rng.randrange(max(1, min(rng.choice([64, 512, end]), end)))
        place = end - place if rng.random() < 0.4 else place
        # Lengths and offsets that lie, and bytes that end a text or begin another.
        number = rng.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, rng.getrandbits(32)])
        lie = rng.choice([number.to_bytes(4, "little"), number.to_bytes(4, "big"), b"\xff" * 8, b"\0" * 8, b"99999999"])
        odd = rng.choice([b"\0", b"\n", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"\x1b[2J", rng.randbytes(9)])
        how = rng.choice(["flip", "flip", "lie", "lie", "end", "cut", "double", "insert", "append"])
        if how == "flip":
            content[place : place + 1] = bytes(byte ^ 1 << rng.randrange(8) for byte in content[place : place + 1])
        elif how == "lie":
            content[place : place + len(lie)] = lie
        elif how == "end":
            del content[place:]
        elif how == "cut":
            del content[place : place + rng.randint(1, 64)]
        elif how == "double":
            content[place:place] = content[place : place + rng.randint(1, 64)]
        elif how == "insert":
            content[place:place] = odd
        else:
            content += rng.choice([data[: rng.randint(0, len(data))], b"\0" * 512, rng.randbytes(600)])
    return bytes(content)


def spoil_value(value: Any, rng: random.Random) -> Any:
    """A JSON value in which one place, at any depth, is gone, doubled or of another value or kind."""
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        changed: Any = value.copy()
        place = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        if rng.random() < 0.1:
            del changed[place]
        elif rng.random() < 0.1 and isinstance(value, list):
            changed.insert(rng.randrange(len(value)), value[place])
        else:
            changed[place] = spoil_value(value[place], rng)
        return changed
    other = [
        None,
        True,
        -1,
        0,
        1,
        7,
        0.5,
        float("nan"),
        1 << 61,
        10**30,
        "",
        "a\n\x1b[2J",
        "../x",
        "\ud800",
        [],
        {},
        [[]],
    ]
    near = [value + 1, value - 1, value * 2] if type(value) is int else []
    return rng.choice(near or other) if rng.random() < 0.5 else rng.choice(other)
