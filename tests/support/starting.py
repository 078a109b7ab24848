"""Starting the real command in its three ways, and watching it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
TIMEOUT_S = 150
SMALL = (
    "model.name=squeezenet1_1",
    "model.num_classes=12",
    "transform.size=32",
    "data.image_size=[3,32,32]",
    "batch_size=4",
    "loader.workers=1",
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


Process = subprocess.Popen[str]


@contextmanager
def started(command: list[str], cwd: Path) -> Iterator[Process]:
    """Start a command, its output in files in its working folder; whatever is left of it at the end is killed."""
    with (cwd / "stdout.txt").open("w") as out, (cwd / "stderr.txt").open("w") as err:
        process = subprocess.Popen(
            command, cwd=cwd, stdout=out, stderr=err, stdin=subprocess.DEVNULL, text=True, start_new_session=True
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def finish(process: Process, cwd: Path, since: float) -> Ended:
    code = process.wait(TIMEOUT_S)
    return Ended(
        code=code,
        out=(cwd / "stdout.txt").read_text(),
        err=(cwd / "stderr.txt").read_text(),
        seconds=time.monotonic() - since,
    )


def run(command: list[str], cwd: Path) -> Ended:
    with started(command, cwd) as process:
        return finish(process, cwd, time.monotonic())


def wait_until(condition: Callable[[], bool], process: Process) -> None:
    """Wait for a condition, as long as the process lives."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert process.poll() is None, "the process ended first"
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.02)


def committed_rows(run_dir: Path) -> int:
    """Rows that the manifest of a running job lists."""
    try:
        return sum(part["rows"] for part in json.loads((run_dir / "manifest.json").read_text())["parts"])
    except FileNotFoundError:
        return 0


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
