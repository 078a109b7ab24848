"""The same models in a plain loop: DistributedDataParallel, DistributedSampler, a DataLoader with workers."""

import os

import brought
import peer
import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler
from torchvision import datasets, transforms

SIDE = int(os.environ["SIDE"])
AUTOCAST = os.environ.get("AUTOCAST") == "1"


def on_host(found):  # type: ignore[no-untyped-def]
    if isinstance(found, torch.Tensor):
        return found.cpu()
    rows = found.values() if isinstance(found, dict) else [value for row in found for value in row.values()]
    return [value.cpu() for value in rows]


@torch.no_grad()
def main() -> None:
    args = peer.parse()
    device = peer.join()
    meter = peer.Meter(args)
    to_input = transforms.Compose([transforms.Resize((SIDE, SIDE)), transforms.ToTensor()])
    dataset = datasets.ImageFolder(args.root, to_input)
    sampler = DistributedSampler(dataset, shuffle=False)
    loader = peer.loader(dataset, peer.UntilOver(sampler, meter), batch_size=args.batch_size, workers=args.workers)
    model = peer.replicated(brought.build().eval(), device)
    predictions = []
    for images, _ in loader:
        images = images.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=torch.float16, enabled=AUTOCAST and peer.CUDA):
            found = model(images)
        predictions.append(on_host(brought.outputs(found)))
        meter.add(len(images))
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, len(predictions))
    meter.report("DDP")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
