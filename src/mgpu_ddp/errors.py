"""The error tree, sorted by whose fault an error is; each class knows the exit code it leaves with."""

import sysconfig
import traceback
from enum import IntEnum
from pathlib import Path
from typing import Any

NOT_THE_USERS = ("site-packages", str(Path(__file__).parent), sysconfig.get_path("stdlib"), "<frozen")
"""In the file names of code that is not the user's own."""
PLUGINS: set[str] = set()
"""Packages whose code is the user's own although they are installed."""


class Exit(IntEnum):
    """Exit codes of a worker, which `mgpu-infer` returns (torchrun itself only ever returns 0 or 1)."""

    COMPLETE = 0
    FAILED = 1
    USAGE = 2
    TOO_MANY_ERRORS = 3
    PREEMPTED = 75


class MgpuError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = Exit.FAILED
    words: tuple[str, ...] = ()
    """Overrides with which the same command would get past it."""

    def __init__(self, text: str, words: tuple[str, ...] = ()) -> None:
        super().__init__(printable(text))
        self.words = words


class UsageError(MgpuError):
    """The user's fault: one line that names the key, the rule, the value and the remedy; no traceback."""

    exit_code = Exit.USAGE


class PeerError(MgpuError):
    """Another rank's fault: this rank is healthy and leaves because of it."""


class PeerFailedError(PeerError):
    """Another rank raised; its own report holds the cause."""


class PeerLostError(PeerError):
    """Another rank died or fell silent, so no further collective of this process group can succeed."""


class StateError(MgpuError):
    """The fault of the data or the machine, which one line names; a traceback would say no more."""


class HangError(StateError):
    """A device has stopped answering this process: only another process can go on."""


class SampleError(StateError):
    """A sample could not be predicted, and the job is to end for it."""


class OutOfMemoryError(StateError):
    """The value of a key needs more memory than there is."""

    @classmethod
    def of(cls, key: str, value: int | str, error: RuntimeError) -> "OutOfMemoryError":
        """Tell it in one line."""
        # CUDA's message is half a screen long; its first sentence says what was asked for.
        why = str(error).splitlines()[0].partition(". GPU ")[0]
        words = (f"{key}={value // 2}",) if key == "batch_size" and isinstance(value, int) and value > 1 else ()
        return cls(f"{key} must fit into memory, got {value} ({why}). Lower it.", words)


class ProtocolError(MgpuError):
    """Ranks disagree about which job, window or topic they are in: a defect of this package."""


class ProofError(StateError):
    """The final proof failed: the folder does not hold exactly one row for every sample."""


class WriteError(StateError):
    """The output folder could not be written to; what was committed before stays valid."""


class RunError(MgpuError):
    """The ranks that `mgpu_ddp.predict` started did not complete the run; `exit_code` says how they left."""

    def __init__(self, reason: str, exit_code: Exit, folder: Path | None) -> None:
        # Of several lines, where the reason is a traceback.
        Exception.__init__(self, "\n".join(map(printable, reason.splitlines())))
        self.exit_code = exit_code
        self.folder = folder
        """The run folder, which `mgpu_ddp.open` opens; None where there is none."""


def printable(text: str) -> str:
    """The text in one line that no terminal obeys: escape what is not printable, such as controls and newlines."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def plural(number: int, noun: str) -> str:
    """`1 row`, `2,000 rows`, `0 classes`."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


def cause_of(error: Exception) -> str:
    """Why a file or URL cannot be read, in one line, without its path, which the caller's own message names."""
    return " ".join((getattr(error, "strerror", None) or str(error)).split())


def reason_of(error: BaseException) -> str:
    """Name an error in one line."""
    text = " ".join(str(error).split())
    return (
        text if isinstance(error, MgpuError) and not isinstance(error, PeerError) else f"{type(error).__name__}: {text}"
    )


def kind_of(value: Any) -> str:
    """A tensor or an array by its dtype and shape, anything else by its type."""
    is_array = hasattr(value, "dtype") and hasattr(value, "shape")
    return f"{value.dtype} {tuple(value.shape)}".removeprefix("torch.") if is_array else type(value).__name__


def words_past(error: BaseException | None) -> tuple[str, ...]:
    """Overrides with which the command that met an error would get past it."""
    return error.words if isinstance(error, MgpuError) else ()


def place_in_code(error: BaseException) -> str:
    """Name an error that code of the user's raised, with the line of theirs that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _is_users(frame.filename)]
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}{where}"


def _is_users(file: str) -> bool:
    return not any(place in file for place in NOT_THE_USERS) or not PLUGINS.isdisjoint(
        part.removesuffix(".py") for part in Path(file).parts
    )
