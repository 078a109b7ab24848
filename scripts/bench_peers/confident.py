"""Train ResNet18 on a folder of class folders until it is confident, and save a checkpoint; for scripts/bench accuracy.

Images are decoded once and stay on the device; prints one JSON line. Labels are smoothed, so that the model is never
certain: probabilities of exactly 1 would hide every difference.
"""

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch.nn.functional import cross_entropy

SIDE, MARGIN = 256, 16
"""Pixels of a kept image, and how far a crop may lie off its middle."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMOOTHING, PEAK_RATE, DECAY = 0.05, 2e-3, 0.05


def decode(paths: list[Path]) -> torch.Tensor:
    """Decode and resize on all cores: uint8 (n, 3, SIDE, SIDE), colours last in memory."""
    # NumPy's: torch would start threads of its own for each copy.
    images = np.empty((len(paths), SIDE, SIDE, 3), dtype=np.uint8)

    def decode_one(number: int) -> None:
        with Image.open(paths[number]) as image:
            fitted = ImageOps.fit(image.convert("RGB"), (SIDE, SIDE), Image.Resampling.BILINEAR)
        images[number] = np.asarray(fitted)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(decode_one, range(len(paths))))
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def crop(images: torch.Tensor, side: int) -> torch.Tensor:
    """Cut one square out of all images and turn half of them around, which keeps the direction of a pattern."""
    top, left = ((SIDE - side) // 2 + int(torch.randint(-MARGIN, MARGIN + 1, ())) for _ in range(2))
    cut = images[:, :, top : top + side, left : left + side]
    half = len(cut) // 2
    return torch.cat([cut[:half].flip(2, 3), cut[half:]])


def train(images: torch.Tensor, labels: torch.Tensor, args: argparse.Namespace) -> tuple[torch.nn.Module, float]:
    """Train on the device that holds the images: the model, and the mean loss of the last epoch."""
    device = images.device
    model = torchvision.models.resnet18(num_classes=int(labels.max()) + 1)
    model = model.to(device, memory_format=torch.channels_last).train()
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) * 255 for values in (MEAN, STD))
    per_epoch = len(images) // args.batch_size
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=args.epochs * per_epoch)
    for _ in range(args.epochs):
        losses = torch.zeros((), device=device)
        order = torch.randperm(len(images)).to(device)
        for picked in order[: per_epoch * args.batch_size].split(args.batch_size):
            pixels = (crop(images[picked], args.side).float() - mean) / std
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                outputs = model(pixels.contiguous(memory_format=torch.channels_last))
            loss = cross_entropy(outputs.float(), labels[picked], label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses += loss.detach()
    return model, float(losses) / per_epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--side", type=int, default=224, help="pixels of the crops")
    args = parser.parse_args()
    started = time.perf_counter()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    paths = sorted(args.folder.glob("*/*.jpg"))
    images = decode(paths).to(device)
    labels = torch.tensor([int(path.parent.name) for path in paths], device=device)
    decoded_s = time.perf_counter() - started
    model, loss = train(images, labels, args)
    torch.save(model.cpu().state_dict(), args.checkpoint)
    trained_s = time.perf_counter() - started - decoded_s
    print(json.dumps({"images": len(paths), "loss": loss, "decoded_s": decoded_s, "trained_s": trained_s}))


if __name__ == "__main__":
    main()
