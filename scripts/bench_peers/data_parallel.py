"""nn.DataParallel over all GPUs of one process, and a DataLoader with workers.

Source: docs.pytorch.org, torch.nn.DataParallel.
"""

import peer
import torch
from torch import nn


@torch.no_grad()
def main() -> None:
    args = peer.parse()
    meter = peer.Meter(args)
    dataset = peer.folder(args)
    # DataParallel splits each batch among the GPUs.
    loader = peer.loader(
        dataset,
        peer.UntilOver(range(len(dataset)), meter),
        batch_size=args.batch_size * args.gpus,
        workers=args.workers * args.gpus,
    )
    device = torch.device("cuda" if peer.CUDA else "cpu")
    model = peer.model().to(device)
    if peer.CUDA and torch.cuda.device_count() > 1:
        model = nn.DataParallel(model)

    predictions = []
    for images, _ in loader:
        images = images.to(device, non_blocking=True).to(memory_format=torch.channels_last)
        with peer.autocast():
            predictions.append(model(images).argmax(dim=1).cpu())
        meter.add(len(predictions[-1]))
    torch.save(torch.cat(predictions), "predictions.pt")
    meter.report("DataParallel")


if __name__ == "__main__":
    main()
