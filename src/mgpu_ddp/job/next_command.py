"""The command that continues a job: the one that started it, in the same run folder."""

import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from mgpu_ddp.config.paths import to_type
from mgpu_ddp.distributed.command import StartCommand

FRESH = ("overwrite", "resume")
"""Keys by which a command starts anew, or refuses to continue."""


def next_words(start: StartCommand, folder: Path, *, sweep: bool, words: Sequence[str] = ()) -> list[str]:
    """The words that continue in the folder of a job, or of a whole sweep, with some more overrides."""
    key = "hydra.sweep.dir" if sweep else "output.dir"
    kept = [word for word in start.words if _key(word) not in (*FRESH, *map(_key, words))]
    # A job of a sweep that was started by itself has the sweep's command, which names the sweep's folder.
    is_sweeps = not sweep and any(_key(word) == "hydra.sweep.dir" for word in kept)
    if not is_sweeps and not any(_names(word, key, folder, start.cwd) for word in kept):
        kept = [word for word in kept if _key(word) not in (key, "hydra.run.dir")]
        kept.append(f"{key}={to_type(str(folder))}")
    return [*kept, *words]


def shell_line(start: StartCommand, words: Iterable[str]) -> str:
    """Words as a line for a shell, from whatever folder."""
    return f"cd {_quote(start.cwd)} && {' '.join(map(_quote, words))}"


def _key(word: str) -> str:
    return word.lstrip("+").partition("=")[0]


def _names(word: str, key: str, folder: Path, cwd: str) -> bool:
    """Tell whether a word names the folder as it is typed."""
    path = os.path.expanduser(word.partition("=")[2])
    return _key(word) in (key, "hydra.run.dir") and Path(cwd, path) == folder


def _quote(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    # As POSIX has it since 2024, and shells for long: no terminal obeys it, and it is text.
    shown = (chr(b) if 32 <= b < 127 and b not in b"'\\" else f"\\x{b:02x}" for b in os.fsencode(word))
    return f"$'{''.join(shown)}'"
