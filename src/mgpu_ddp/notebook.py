"""`mgpu_ddp.predict`: start the ranks from a notebook or a script, wait for them, and return their run.

The functions travel by cloudpickle, so that those defined in a notebook do as well, in a file that only this user may
read, to processes that this one starts.
"""

import io
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle

from mgpu_ddp.config.checks import require
from mgpu_ddp.config.compose import quote
from mgpu_ddp.config.schema import GROUPS
from mgpu_ddp.distributed.command import COMMAND
from mgpu_ddp.distributed.launcher import OUTCOME_FILE, literal, num_processes, outcome_in
from mgpu_ddp.errors import Exit, PeerFailedError, PeerLostError, RunError, UsageError
from mgpu_ddp.program import check_functions
from mgpu_ddp.run import Run

if TYPE_CHECKING:
    from torch import nn

FUNCTIONS_FILE = "MGPU_DDP_FUNCTIONS_FILE"
"""The environment variable that names the file of functions to a rank."""
SOURCES = {".csv": "list", ".txt": "list", ".npy": "array", ".tar": "webdataset", ".parquet": "parquet"}
"""The data that a path or URL names by its ending; all others are folders."""
LOCATIONS = {"folder": "root", "list": "path", "array": "path", "webdataset": "urls", "parquet": "urls"}


def predict(
    *,
    model: "Callable[[], nn.Module] | str | None" = None,
    transform: Callable[[], Any] | str | None = None,
    dataset: Callable[[], Any] | None = None,
    outputs: Callable[[Any], Any] | None = None,
    version: str = "",
    data: str | os.PathLike[str] | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    processes: int | str = "auto",
    batch_size: int | str | None = None,
    **overrides: Any,
) -> Run:
    """Predict every sample, in processes of its own: one per GPU, or one where there is none.

    The functions are those of `mgpu_ddp.main`; `model` and `transform` may also name an option (`model="timm"`).
    `data` is a folder of images, a list of them (.csv, .txt), an array (.npy), a pattern of tars (.tar) or of Parquet
    files (.parquet), or the name of an option: "fake", or "list" with its keys as overrides. Any other key of the
    configuration is an override: `seed=1`, `runtime={"precision": "fp32"}` or `**{"runtime.precision": "fp32"}`.

    An interrupt (Ctrl-C) ends the run after its current window; the same call continues it, if it names `output_dir`.

    Raises:
        UsageError: a mistake in the arguments, or in what the functions return.
        RunError: the run has failed, with the traceback of the rank that did, or has too many errors.
    """
    # 1) What travels to the ranks.
    functions: dict[str, Any] = {"model": model, "transform": transform, "dataset": dataset, "outputs": outputs}
    chosen: dict[str, Any] = {name: option for name, option in functions.items() if isinstance(option, str)}
    functions = {name: None if name in chosen else function for name, function in functions.items()}
    check_functions(functions, version)
    chosen |= {} if data is None else source(data)
    chosen |= {} if output_dir is None else {"output.dir": output_dir}
    chosen |= {} if batch_size is None else {"batch_size": batch_size}
    words = [word for key, value in (chosen | overrides).items() for word in words_of(key, value)]
    ok = processes == "auto" or (isinstance(processes, int) and processes >= 1)
    require(ok, "processes", "at least 1 or auto", processes, "Try processes=2.")
    require(not overrides.get("dry_run"), "dry_run", "left out here, since it makes no run", True, "Leave it out.")
    others = os.environ.get("WORLD_SIZE", "1")
    require(others == "1", "WORLD_SIZE", "1 for predict, which starts the ranks", others, "Start it by python alone.")
    with tempfile.TemporaryDirectory(prefix="mgpu_ddp-") as private:
        folder = Path(private)
        send(functions | {"version": version}, folder / "functions")
        # 2) The ranks.
        start = [f"--nproc_per_node={num_processes(processes)}", f"--log-dir={folder}", "--no-python"]
        launcher = python("from mgpu_ddp.distributed.launcher import main; main()")
        command = [*launcher, *start, *python("from mgpu_ddp.notebook import be_rank; be_rank()"), *literal(words)]
        files = {FUNCTIONS_FILE: str(folder / "functions"), OUTCOME_FILE: str(folder / "outcome"), COMMAND: ""}
        run_ranks(command, os.environ | files)
        # 3) How it went.
        outcome, failures = outcome_in(folder / "outcome"), sorted(failures_in(folder))
    code, reason = Exit(outcome.get("exit_code", Exit.FAILED)), str(outcome.get("reason", ""))
    run_dir = Path(outcome["run_dir"]) if "run_dir" in outcome else None
    if code == Exit.COMPLETE and run_dir is not None:
        return Run(folder=run_dir)
    if code == Exit.USAGE:
        raise UsageError(reason)
    if code == Exit.FAILED:
        _, said, told = failures[0] if failures else (False, "rank 0 was killed, see above", "")
        reason = f"{reason or said}\n\n{told}".rstrip()
    raise RunError(reason, code, run_dir)


def source(data: str | os.PathLike[str]) -> dict[str, str]:
    """The keys that choose this source."""
    location = os.fspath(data)
    if location == "fake" or (location in GROUPS["data"] and not os.path.exists(location)):
        return {"data": location}
    option = "folder" if os.path.isdir(location) else SOURCES.get(os.path.splitext(location)[1].lower(), "folder")
    return {"data": option, f"data.{LOCATIONS[option]}": location}


def words_of(key: str, value: Any) -> Iterator[str]:
    """An override as words of the command line: several, where it is a dict.

    Raises:
        UsageError: it cannot be one.
    """
    ok = re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key) is not None
    require(ok, "override", "a key of the configuration", key, "See python -m mgpu_ddp.infer --help.")
    if isinstance(value, dict):
        for name, child in value.items():
            yield from words_of(f"{key}.{name}", child)
    else:
        yield f"{key}={_value(key, value)}"


def _value(key: str, value: Any) -> str:
    """A value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | os.PathLike):
        return quote(os.fspath(value))
    if isinstance(value, list | tuple):
        return f"[{','.join(_value(key, each) for each in value)}]"
    rule = "text, a path, a number, a bool, None, or a list or dict of these"
    require(isinstance(value, Real), key, rule, value, "Convert it.")
    return repr(int(value) if isinstance(value, Integral) else float(value))


class Pickler(cloudpickle.Pickler):
    """Pickles tensors as ones of the CPU: where every rank put them back on this process's GPU, it would run full."""

    def reducer_override(self, value: Any) -> Any:
        import torch

        # A parameter is pickled by its data.
        if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
            return value.cpu().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return super().reducer_override(value)


def send(functions: dict[str, Any], file: Path) -> None:
    """Write the functions where only this user can read them.

    Raises:
        UsageError: they cannot be pickled.
    """
    pickled = io.BytesIO()
    try:
        Pickler(pickled).dump(functions)
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UsageError(
            f"model, transform, dataset and outputs must be functions that can be pickled, got {why}. Make what they"
            " need inside of them."
        ) from error
    file.touch(mode=0o600)
    file.write_bytes(pickled.getbuffer())


def be_rank() -> None:
    """Run the program on the functions that `predict` has sent, as one of its ranks."""
    from torch.distributed.elastic.multiprocessing.errors import record

    from mgpu_ddp import program
    from mgpu_ddp.job.session import end_process

    pickled = Path(os.environ[FUNCTIONS_FILE]).read_bytes()
    # What cannot be loaded here is told as what a rank raises.
    functions: Any = record(cloudpickle.loads)(pickled)
    program.main(**functions)
    end_process(Exit.COMPLETE)


def python(code: str) -> list[str]:
    """Another interpreter that runs code, and finds the modules that this one does."""
    path = [os.path.abspath(entry) for entry in sys.path]
    return [sys.executable, "-u", "-P", "-c", f"import sys; sys.path[:] = {path!r}; {code}"]


def run_ranks(command: list[str], environ: dict[str, str]) -> None:
    """Run the command, with all it says on this process's stderr, until it has ended.

    An interrupt is passed on, and raised once the ranks have left; a second one does not wait for them.
    """
    # A notebook's stderr is no file, or not the one that is shown.
    into = sys.stderr if sys.stderr is sys.__stderr__ else subprocess.PIPE
    with subprocess.Popen(
        command,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=into,
        stderr=subprocess.STDOUT,
        # Or the ranks would get the terminal's Ctrl-C besides, and take it for a second wish.
        start_new_session=True,
        text=True,
        errors="replace",
    ) as launcher:
        try:
            _show(launcher)
        except KeyboardInterrupt:
            print("mgpu_ddp: the run ends after this window; interrupt again to end it at once", file=sys.stderr)
            launcher.terminate()
            _show(launcher)
            raise
        finally:
            # The ranks die with it.
            launcher.kill()


def _show(launcher: "subprocess.Popen[str]") -> None:
    for line in launcher.stdout or ():
        sys.stderr.write(line)
        sys.stderr.flush()
    launcher.wait()


def failures_in(folder: Path) -> Iterator[tuple[bool, str, str]]:
    """The errors that ranks have raised, kept by torchrun: if for another rank, in one line, and with its traceback."""
    for file in folder.rglob("error.json"):
        said = json.loads(file.read_text())["message"]
        is_peer = said["message"].startswith((PeerFailedError.__name__, PeerLostError.__name__))
        yield is_peer, said["message"], f"Traceback of rank {file.parent.name}:\n{said['extraInfo']['py_callstack']}"
