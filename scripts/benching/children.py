"""Run commands as whole processes and see what they took. Source of what the kernel tells: proc(5)."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PEERS = Path(__file__).resolve().parent.parent / "bench_peers"
CHILD_TIMEOUT_S = 3600
TERMINATION_S = 40
"""More than torchrun waits for its workers."""


class ChildFailedError(Exception):
    """A measured process failed; the text is what it said last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Competitor:
    """A command that is timed as a whole process."""

    name: str
    command: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One run of one competitor."""

    wall_s: float
    cpu_s: float
    """CPU time of the process and its children."""
    others_cores: float | None
    """CPU cores that the rest of the machine kept busy meanwhile: noise. None where /proc/stat is missing."""
    said: dict[str, Any]
    """The last JSON object that stands on a line of its output, empty where there is none."""


def run_child(command: list[str], folder: Path, *, timeout_s: float = CHILD_TIMEOUT_S) -> Measurement:
    """Run a command in a folder of its own, its output in files there, and time it as a whole.

    Raises:
        ChildFailedError: it did not leave with 0, or not in time.
    """
    folder.mkdir(parents=True)
    cpu_before, busy_before = _children_cpu_s(), _machine_busy_s()
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        started = time.perf_counter()
        # In a session of its own, so that what it has started can be ended with it.
        child = subprocess.Popen(command, cwd=folder, env=environment(), stdout=out, stderr=err, start_new_session=True)
        try:
            child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ChildFailedError(f"{' '.join(command)}\nmust end within {timeout_s:g} s; see {folder}.") from None
        finally:
            wall_s = time.perf_counter() - started
            if child.poll() is None:
                # torchrun ends its workers, which have sessions of their own.
                child.terminate()
                with suppress(subprocess.TimeoutExpired):
                    child.wait(TERMINATION_S)
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    cpu_s, busy_after = _children_cpu_s() - cpu_before, _machine_busy_s()
    check_exit(command, folder, child.returncode)
    others = (
        max(0.0, busy_after - busy_before - cpu_s) / wall_s
        if busy_before is not None and busy_after is not None
        else None
    )
    return Measurement(wall_s=wall_s, cpu_s=cpu_s, others_cores=others, said=last_json(folder))


def environment() -> dict[str, str]:
    """The environment without a launcher's traces, in which a child would look for its peers."""
    foreign = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_")
    return {key: value for key, value in os.environ.items() if not key.startswith(foreign)}


def check_exit(command: list[str], folder: Path, code: int) -> None:
    if code != 0:
        said = "\n".join((folder / name).read_text(errors="replace")[-4000:] for name in ("stdout", "stderr"))
        raise ChildFailedError(f"{' '.join(command)}\nmust succeed, got exit code {code} in {folder}. It said:\n{said}")


def last_json(folder: Path) -> dict[str, Any]:
    lines = (folder / "stdout").read_text(errors="replace").splitlines()
    # A library's other processes may speak last.
    return next((dict(json.loads(line)) for line in reversed(lines) if line.startswith("{")), {})


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _machine_busy_s() -> float | None:
    """CPU seconds the whole machine was busy since boot. Source: proc(5), /proc/stat."""
    try:
        ticks = [int(text) for text in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def rank_0_below(parent: int) -> int | None:
    """The worker of rank 0 among the children of torchrun."""
    for folder in Path("/proc").iterdir():
        try:
            if (
                folder.name.isdecimal()
                and stat_fields(folder)[1] == str(parent)
                and b"RANK=0" in (folder / "environ").read_bytes().split(b"\0")
            ):
                return int(folder.name)
        except OSError:
            continue  # it has ended meanwhile
    return None


def stat_fields(folder: Path) -> list[str]:
    """The fields of /proc/PID/stat after the command's name: state, parent, ..., start in ticks (number 19)."""
    return (folder / "stat").read_text().rpartition(")")[2].split()


def torchrun(processes: int, *options: str) -> list[str]:
    """torchrun of this interpreter's environment."""
    beside = shutil.which("torchrun", path=str(Path(sys.executable).parent))
    command = [beside] if beside else [sys.executable, "-m", "torch.distributed.run"]
    return [*command, "--standalone", f"--nproc_per_node={processes}", *options]
