"""Starting processes and looking at them. Source of what the kernel says of them: proc(5)."""

import os
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

LAUNCHERS = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_")
"""How the names begin that a launcher sets: with them a child would look for peers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """A live process; zombies are left out."""

    pid: int
    parent: int
    group: int
    session: int
    cpu_s: float
    began_s: float
    """On CLOCK_BOOTTIME."""


def living() -> list[Process]:
    """List all live processes."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, group, session, *rest = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if state not in "ZX":
            ticks = os.sysconf("SC_CLK_TCK")
            process = Process(
                pid=int(folder.name),
                parent=int(parent),
                group=int(group),
                session=int(session),
                cpu_s=(int(rest[7]) + int(rest[8])) / ticks,
                began_s=int(rest[15]) / ticks,
            )
            found.append(process)
    return found


def children(parent: int) -> list[int]:
    """List the processes that the main thread of a process has started; quicker than looking at all."""
    try:
        return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    except OSError:
        return []


def ranks_below(launcher: int) -> dict[int, Process]:
    """Find the workers of a torchrun: rank → process."""
    ranks = {}
    for process in living():
        if process.parent != launcher:
            continue
        try:
            environ = (Path("/proc") / str(process.pid) / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        for item in environ:
            if item.startswith(b"RANK="):
                ranks[int(item[5:])] = process
    return ranks


def torchrun(*options: str) -> list[str]:
    """Begin a command with the torchrun of this interpreter."""
    return [sys.executable, "-m", "torch.distributed.run", *options]


@contextmanager
def started(command: list[str], folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a command in a new folder, its output in files there; kill at the end whatever is left of it."""
    folder.mkdir(parents=True)
    env = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
    try:
        yield process
    finally:
        kill_sessions(sessions_of(process.pid))
        process.wait()


def sessions_of(launcher: int) -> set[int]:
    """Name the sessions of a command: its own, and those that torchrun gives its workers."""
    return {launcher, *(rank.session for rank in ranks_below(launcher).values())}


def kill_sessions(sessions: Collection[int]) -> None:
    """Kill all processes of some sessions."""
    for process in living():
        if process.session in sessions:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
