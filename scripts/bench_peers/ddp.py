"""One process per GPU under torchrun: DistributedDataParallel, DistributedSampler and all_gather_object.

Source: docs.pytorch.org, "Multi GPU training with DDP" and torch.distributed.all_gather_object.
"""

import peer
import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler


@torch.no_grad()
def main() -> None:
    args = peer.parse()
    device = peer.join()
    meter = peer.Meter(args)
    dataset = peer.folder(args)
    sampler = DistributedSampler(dataset, shuffle=False)
    loader = peer.loader(dataset, peer.UntilOver(sampler, meter), batch_size=args.batch_size, workers=args.workers)
    model = peer.replicated(peer.model(), device)

    predictions = []
    for images, _ in loader:
        images = images.to(device, non_blocking=True).to(memory_format=torch.channels_last)
        with peer.autocast():
            predictions.append(model(images).argmax(dim=1).cpu())
        meter.add(len(predictions[-1]))
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, torch.cat(predictions))
    if peer.RANK == 0:
        torch.save(gathered, "predictions.pt")
    meter.report("DDP")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
