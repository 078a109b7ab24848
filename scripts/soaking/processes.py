"""Looking at processes by what the kernel tells about them. Source: proc(5)."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """A process that lives, one that waits to be reaped left out."""

    pid: int
    parent: int
    group: int
    session: int
    cpu_s: float


def living() -> list[Process]:
    """All processes that live."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, group, session, *rest = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if state not in "ZX":
            cpu_s = (int(rest[7]) + int(rest[8])) / os.sysconf("SC_CLK_TCK")
            process = Process(
                pid=int(folder.name), parent=int(parent), group=int(group), session=int(session), cpu_s=cpu_s
            )
            found.append(process)
    return found


def children(parent: int) -> list[int]:
    """The processes that the main thread of a process has started; quicker than looking at all."""
    try:
        return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    except OSError:
        return []


def ranks_below(launcher: int) -> dict[int, Process]:
    """Rank → process, of the workers of a torchrun."""
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
