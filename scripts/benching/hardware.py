"""The GPUs of this machine and who shares its cores, asked in a process of its own: torch stays out of this one."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CODE = """
import json, torch
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"gpus": names, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}))
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """The hardware to run on."""

    gpus: list[str]
    cuda: str | None
    cudnn: int | None
    driver: str | None


def look() -> Hardware:
    """See which GPUs torch finds."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    return Hardware(**json.loads(done.stdout.splitlines()[-1]), driver=_driver())


def _driver() -> str | None:
    if not (smi := shutil.which("nvidia-smi")):
        return None
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def describe(hardware: Hardware) -> str:
    """The GPUs and what drives them, for below a table."""
    if not hardware.gpus:
        return "no GPU"
    names = ", ".join(f"{count} × {name}" for name, count in Counter(hardware.gpus).items())
    return f"{names}, driver {hardware.driver}, CUDA {hardware.cuda}"


@contextmanager
def share(hardware: Hardware, gpus: int, *, cpu_shares: int | None = None) -> Iterator[None]:
    """Let children of the block have so many GPUs, and the same share of the cores.

    Where there is none they have all cores, or so many of `cpu_shares` shares.
    """
    shares = len(hardware.gpus) or cpu_shares
    if not shares:
        yield
        return
    cores, visible = os.sched_getaffinity(0), os.environ.get("CUDA_VISIBLE_DEVICES")
    os.sched_setaffinity(0, whole_cores_first(cores)[: cores_each(shares) * gpus])
    if hardware.gpus:
        names = visible.split(",") if visible else [str(i) for i in range(shares)]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[:gpus])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
        else:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)


def cores_each(shares: int) -> int:
    """How many of the cores that this process may use one of so many equal shares has."""
    return max(1, len(os.sched_getaffinity(0)) // shares)


def whole_cores_first(cpus: Iterable[int]) -> list[int]:
    """Order logical CPUs so that both threads of a core come together: half of them is half of the machine."""
    return sorted(cpus, key=lambda cpu: (_first_thread(cpu), cpu))


def _first_thread(cpu: int) -> int:
    """Number of the first thread of a CPU's core. Source: Linux, Documentation/admin-guide/cputopology.rst."""
    try:
        threads = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return cpu
    return int(threads.replace("-", ",").split(",")[0])
