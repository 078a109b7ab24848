"""The GPUs of this machine and who shares its cores, asked in a process of its own: torch stays out of this one."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

CODE = """
import json, torch
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"gpus": names, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}))
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """What there is to run on."""

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


@contextmanager
def share(hardware: Hardware, gpus: int) -> Iterator[None]:
    """Let children of the block have so many GPUs, and the same share of the cores; where there is none, all cores."""
    if not hardware.gpus:
        yield
        return
    cores, visible = os.sched_getaffinity(0), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(len(hardware.gpus))]
    os.sched_setaffinity(0, sorted(cores)[: len(cores) // len(hardware.gpus) * gpus])
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[:gpus])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        if visible is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
