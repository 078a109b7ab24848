"""The tutorial this project grew from, as it is usually written: FakeData → ResNet18 → one array of predictions.

Its weights are random here, so that it runs without a network; that changes nothing about its speed. Three settings
may be given, for a benchmark to choose what suits it best: `tutorial.py NUM_IMAGES NUM_WORKERS SECONDS`. It ends when
it has run for so long after its first ten batches, which the rate on its last line leaves out.
"""

import json
import sys
import time

import numpy as np
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms


class SimpleModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.resnet = torchvision.models.resnet18()

    def forward(self, x):
        return self.resnet(x)


WARM_UP = 10


def main(num_images=1000, num_workers=2, seconds=float("inf")):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transform = transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor()])
    dataset = torchvision.datasets.FakeData(
        size=num_images, image_size=(3, 224, 224), num_classes=10, transform=transform
    )
    loader = DataLoader(dataset, batch_size=32, shuffle=False, num_workers=num_workers)

    model = SimpleModel()
    if torch.cuda.device_count() > 1:
        model = nn.DataParallel(model)
    model = model.to(device)
    model.eval()

    predictions = []
    started = time.perf_counter()
    with torch.no_grad():
        for images, _ in loader:
            outputs = model(images.to(device))
            predictions.append(outputs.cpu().numpy())
            if len(predictions) == WARM_UP:
                warm = time.perf_counter()
            elif len(predictions) > WARM_UP and time.perf_counter() - warm >= seconds:
                break
    ended = time.perf_counter()
    predictions = np.concatenate(predictions)

    print(f"predictions {predictions.shape} in {ended - started:.2f} s")
    if (rows := len(predictions) - 32 * WARM_UP) > 0:
        print(json.dumps({"name": "the tutorial's script", "images_per_s": rows / (ended - warm), "rows": rows}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
