"""Shared by the peers, so that they differ in nothing but how they predict: files, model, clock, one JSON line.

Files are decoded by Pillow and transformed by torchvision in loader workers, as all of their documentation has it.
"""

import argparse
import json
import os
import time
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Sampler
from torchvision import datasets, transforms

CUDA = torch.cuda.is_available()
RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
STARTED = time.perf_counter()

TRANSFORM = transforms.Compose(
    [
        transforms.Resize(256),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    ]
)


def parse() -> argparse.Namespace:
    """Read what every peer is told."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root", help="a folder of folders of JPEGs")
    parser.add_argument("--batch-size", type=int, default=256, help="per GPU")
    parser.add_argument("--workers", type=int, default=16, help="per GPU")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20, help="of steady work")
    parser.add_argument("--warm-up", type=float, default=5, help="seconds from the first result that do not count")
    return parser.parse_args()


class Meter:
    """Rows per second of this process once it is warm, until the time is up."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._warm_up, self._seconds = args.warm_up, args.seconds
        self._first = self._last = 0.0
        self._warm = 0.0
        self._rows = 0
        self.all_rows = 0
        self.over = False

    def add(self, rows: int) -> None:
        """Count rows whose predictions have arrived."""
        now = time.perf_counter()
        self._first = self._first or now
        self.all_rows += rows
        if not self._warm:
            # Until then the loader hands out what it had made while the model was built.
            if now - self._first >= self._warm_up:
                self._warm = self._last = now
        elif not self.over:
            self._rows, self._last = self._rows + rows, now
            self.over = now - self._warm >= self._seconds

    def report(self, name: str) -> None:
        """Print the JSON line with the sum over all ranks, on rank 0. Collective where there is a process group."""
        if self._last <= self._warm:
            raise SystemExit(f"{name}: the images must last for more than {self._warm_up} s; give more, or --warm-up")
        mine = [self._rows / (self._last - self._warm), self.all_rows, self._last - self._warm]
        ranks = [mine]
        if dist.is_available() and dist.is_initialized():
            ranks = [mine] * dist.get_world_size()
            dist.all_gather_object(ranks, mine)
        report_line(
            name, sum(rank[0] for rank in ranks), sum(rank[1] for rank in ranks), min(rank[2] for rank in ranks)
        )


def report_line(name: str, images_per_s: float, rows: float, steady_s: float) -> None:
    """Print the JSON line, on rank 0 alone."""
    wall_s = time.perf_counter() - STARTED
    line = {"name": name, "images_per_s": images_per_s, "rows": int(rows), "steady_s": steady_s, "wall_s": wall_s}
    if RANK == 0:
        print(json.dumps(line), flush=True)


class UntilOver(Sampler[int]):
    """The indices of another sampler until the meter's time is up; the loader then ends as it always does."""

    def __init__(self, indices: Iterable[int], meter: Meter) -> None:
        self._indices, self._meter = indices, meter

    def __iter__(self) -> Iterator[int]:
        for index in self._indices:
            if self._meter.over:
                return
            yield index

    def __len__(self) -> int:
        return len(self._indices)  # type: ignore[arg-type]


def join() -> torch.device:
    """Open the process group, and return this process's device. Collective: every rank calls this."""
    device = torch.device("cuda", LOCAL_RANK) if CUDA else torch.device("cpu")
    if CUDA:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if CUDA else "gloo")
    return device


def replicated(module: nn.Module, device: torch.device) -> DistributedDataParallel:
    """The module under DDP, on its device."""
    # Without broadcasts of buffers, which would cost time at each step and make every rank wait for the others.
    return DistributedDataParallel(
        module.to(device), device_ids=[LOCAL_RANK] if CUDA else None, broadcast_buffers=False
    )


def folder(args: argparse.Namespace) -> datasets.ImageFolder:
    """The images, decoded and transformed as they are asked for."""
    return datasets.ImageFolder(args.root, TRANSFORM)


def loader(
    dataset: datasets.ImageFolder, sampler: Iterable[int] | None, *, batch_size: int, workers: int
) -> DataLoader:
    """The usual DataLoader with the settings that suit it."""
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, num_workers=workers, pin_memory=CUDA)


def model() -> nn.Module:
    """ResNet18 with random weights, which changes nothing about its speed, in the layout that suits a GPU."""
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    return torchvision.models.resnet18().eval().to(memory_format=torch.channels_last)


def autocast() -> torch.autocast:
    """Half precision where there is a GPU."""
    return torch.autocast("cuda" if CUDA else "cpu", dtype=torch.float16, enabled=CUDA)
