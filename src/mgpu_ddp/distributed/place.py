"""The place of a process among those that were started with it.

A way of starting is a module with `read_place(environ)`: None where the process was not started that way. To add one
(Kubernetes, say), write the module and list it in `WAYS` of `world`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mgpu_ddp.errors import UsageError

Environ = Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a process stands; by default, alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    attempt: int = 0
    """How often the launcher has started these ranks before."""
    cpus: int | None = None
    """CPUs of this rank, where they are allotted rank by rank."""
    master: tuple[str, int] | None = None
    """Address and port of the store at which the ranks meet."""


def numbers(environ: Environ, names: Sequence[str], remedy: str) -> list[int]:
    """Read variables that are whole numbers.

    Raises:
        UsageError: names one that is none.
    """
    for name in names:
        if not environ[name].isdecimal():
            raise UsageError(f"{name} must be a whole number, got {environ[name]!r}. {remedy}")
    return [int(environ[name]) for name in names]


def refuse_missing(environ: Environ, names: Sequence[str], there: str, remedy: str) -> None:
    """Refuse an environment that is half set.

    Raises:
        UsageError: names the variables that are missing, and the one that is there.
    """
    missing = [name for name in names if not environ.get(name)]
    if missing:
        raise UsageError(f"{there} is set in the environment, but not {', '.join(missing)}. {remedy}")
