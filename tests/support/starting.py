"""Starting the command, and watching it: by its three real ways, or as ranks forked from a preloaded process.

Real starts cost seconds each, to import torch. They are for what launchers and fresh interpreters do; all other tests
take `ranks`, or `launched`, which is torchrun itself in a fork.
"""

import json
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mgpu_ddp.distributed.command import COMMAND
from tests.support import forks

BIN = Path(sys.executable).parent
TIMEOUT_S = 150
SMALL = (
    "model.name=squeezenet1_1",
    "model.num_classes=12",
    "transform.size=32",
    "data.image_size=[3,32,32]",
    "batch_size=4",
    "loader.workers=1",
    "model.weights=null",
)
"""Fake images of 32 pixels through a small model: for tests in which ResNet18 at 224 is not the point."""
SMALL_IMAGES = tuple(setting for setting in SMALL if not setting.startswith("data."))


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A finished command."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def summary(self) -> dict[str, Any]:
        """The last line on stdout, which is JSON."""
        last = self.out.splitlines()[-1]
        summary = json.loads(last)
        assert isinstance(summary, dict)
        return summary


def python_m(*settings: str) -> list[str]:
    return [sys.executable, "-m", "mgpu_ddp.infer", *settings]


def torchrun(processes: int, *settings: str, options: tuple[str, ...] = ("--standalone",)) -> list[str]:
    return [str(BIN / "torchrun"), *options, f"--nproc_per_node={processes}", "-m", "mgpu_ddp.infer", *settings]


def mgpu_infer(*settings: str) -> list[str]:
    return [str(BIN / "mgpu-infer"), *settings]


@dataclass(frozen=True, kw_only=True)
class Forks:
    """A command as functions for processes that are forked, each with its part of the environment."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    environs: Sequence[dict[str, str]]


def ranks(size: int, *settings: str) -> Forks:
    """The ranks of `torchrun(size, ...)` without a launcher, or for one rank `python_m(...)`."""
    command = {COMMAND: shlex.join(python_m(*settings) if size == 1 else torchrun(size, *settings))}
    environs = [{}] if size == 1 else places_in_world(size)
    return Forks(function=infer, arguments=settings, environs=[environ | command for environ in environs])


def script_ranks(size: int, script: Path, *settings: str, **environ: str) -> Forks:
    """The ranks of torchrun with a script of the user's, without a launcher."""
    environs = [{}] if size == 1 else places_in_world(size)
    environ |= {COMMAND: shlex.join([sys.executable, str(script), *settings])}
    return Forks(function=be_script, arguments=(str(script), *settings), environs=[e | environ for e in environs])


def launched(processes: int, *settings: str, options: tuple[str, ...] = ("--standalone",)) -> Forks:
    """`torchrun(processes, ...)` in a forked process; its ranks are started as it always does."""
    command = torchrun(processes, *settings, options=options)
    return Forks(function=_torchrun, arguments=tuple(command), environs=[{COMMAND: shlex.join(command)}])


def forked_mgpu_infer(*settings: str) -> Forks:
    """`mgpu_infer(...)` in a forked process; its ranks are started as it always does."""
    return Forks(function=_mgpu_infer, arguments=settings, environs=[{COMMAND: shlex.join(mgpu_infer(*settings))}])


def under_nohup(command: Forks) -> Forks:
    """The command as nohup starts it."""
    return replace(command, function=_ignoring_hangups, arguments=(command.function, *command.arguments))


class World:
    """Forked processes as one, of which the first speaks for all that end alike."""

    def __init__(self, command: Forks, cwd: Path) -> None:
        self.ranks = [
            forks.fork(command.function, *command.arguments, cwd=cwd, **environ) for environ in command.environs
        ]

    @property
    def pid(self) -> int:
        return self.ranks[0].pid

    def poll(self) -> int | None:
        codes = [rank.poll() for rank in self.ranks]
        return None if None in codes else next((code for code in codes if code), 0)

    def wait(self, timeout: float | None = None) -> int:
        return next((code for code in [rank.wait(timeout) for rank in self.ranks] if code), 0)

    def terminate(self) -> None:
        for rank in self.ranks:
            rank.terminate()

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()


def places_in_world(size: int) -> list[dict[str, str]]:
    """The environment of each rank, as torchrun sets it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    return [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def infer(*settings: str) -> None:
    """Be `python -m mgpu_ddp.infer`."""
    from mgpu_ddp import cli
    from mgpu_ddp import infer as module
    from mgpu_ddp.config.script import Script

    sys.argv = [module.__file__, *settings]
    cli.main(module.infer, Script())


def be_script(*words: str) -> None:
    """Be `python SCRIPT ...`."""
    sys.argv = [*words]
    runpy.run_path(words[0], run_name="__main__")


def _mgpu_infer(*settings: str) -> None:
    """Be mgpu-infer."""
    from mgpu_ddp import launch

    sys.argv = ["mgpu-infer", *settings]
    launch.main()


def _ignoring_hangups(function: Callable[..., Any], *arguments: Any) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    function(*arguments)


def _torchrun(*command: str) -> None:
    """Be torchrun."""
    from torch.distributed import run

    sys.argv = [*command]
    run.main()


Process = subprocess.Popen[str] | World


@contextmanager
def started(command: list[str] | Forks, cwd: Path) -> Iterator[Process]:
    """Start a command, its output in files in its working folder; whatever is left of it at the end is killed."""
    process: Process
    with (cwd / "stdout.txt").open("w") as out, (cwd / "stderr.txt").open("w") as err:
        if isinstance(command, Forks):
            process = World(command, cwd)
        else:
            process = subprocess.Popen(
                command, cwd=cwd, stdout=out, stderr=err, stdin=subprocess.DEVNULL, text=True, start_new_session=True
            )
    try:
        yield process
    finally:
        for leader in process.ranks if isinstance(process, World) else [process]:
            with suppress(ProcessLookupError):
                os.killpg(leader.pid, signal.SIGKILL)
            leader.wait()


def finish(process: Process, cwd: Path, since: float) -> Ended:
    code = process.wait(TIMEOUT_S)
    return Ended(
        code=code,
        out=(cwd / "stdout.txt").read_text(),
        err=(cwd / "stderr.txt").read_text(),
        seconds=time.monotonic() - since,
    )


def run(command: list[str] | Forks, cwd: Path) -> Ended:
    with started(command, cwd) as process:
        return finish(process, cwd, time.monotonic())


def wait_until(condition: Callable[[], bool], process: Process) -> None:
    """Wait for a condition, as long as the process lives."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert process.poll() is None, "the process ended first"
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.02)


def wait_until_gone(pids: Iterable[int]) -> None:
    """Wait for processes that should end by themselves within ten seconds."""
    pids, deadline = list(pids), time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "a process outlived the one that started it"
        time.sleep(0.05)


def committed_rows(run_dir: Path) -> int:
    """Rows that the manifest of a running job lists."""
    try:
        return sum(part["rows"] for part in json.loads((run_dir / "manifest.json").read_text())["parts"])
    except FileNotFoundError:
        return 0


def run_all(commands: Sequence[list[str] | Forks], folders: Sequence[Path]) -> list[Ended]:
    """Run commands side by side, each in a folder of its own."""
    since = time.monotonic()
    with ExitStack() as stack:
        processes = [stack.enter_context(started(*each)) for each in zip(commands, folders, strict=True)]
        return [finish(process, cwd, since) for process, cwd in zip(processes, folders, strict=True)]


def worker_pids(launcher: int) -> list[int]:
    """The ranks under a launcher, by rank."""
    pids = {}
    for stat in Path("/proc").glob("[0-9]*/environ"):
        pid = int(stat.parent.name)
        try:
            environ = dict(item.partition(b"=")[::2] for item in stat.read_bytes().split(b"\0"))
            parent = int((stat.parent / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == launcher and b"RANK" in environ:
            pids[int(environ[b"RANK"])] = pid
    return [pids[rank] for rank in sorted(pids)]
