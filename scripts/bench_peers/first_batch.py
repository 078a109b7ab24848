"""The least that predicts under torchrun: import torch, make ResNet18 on the device, predict one batch.

Prints one JSON line with the seconds from the start of its process to the end of that batch.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torchvision


@torch.inference_mode()
def main(batch_size: int = 32) -> None:
    rank = int(os.environ.get("RANK", "0"))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    dtype = torch.float16 if on_gpu else torch.float32
    model = torchvision.models.resnet18().eval().to(device, dtype, memory_format=torch.channels_last)
    images = torch.rand(batch_size, 3, 224, 224).to(device, dtype, memory_format=torch.channels_last)
    model(images).argmax(dim=1).cpu()
    # Source: proc(5), starttime in /proc/self/stat.
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    if rank == 0:
        print(json.dumps({"name": "bare script", "startup_s": age_s}), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
