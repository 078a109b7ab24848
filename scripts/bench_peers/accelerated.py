"""Hugging Face Accelerate: prepare the model and the loader, gather_for_metrics after each batch.

Source: huggingface.co/docs/accelerate, "Add Accelerate to your code" and "Migrating your code", section Evaluate.
"""

import peer
import torch
from accelerate import Accelerator, DataLoaderConfiguration

CHECK_EVERY = 8
"""Batches between two looks at whether the time is up, on which all ranks have to agree."""


@torch.no_grad()
def main() -> None:
    args = peer.parse()
    accelerator = Accelerator(
        mixed_precision="fp16" if peer.CUDA else "no",
        cpu=not peer.CUDA,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
    )
    meter = peer.Meter(args)
    loader = peer.loader(peer.folder(args), None, batch_size=args.batch_size, workers=args.workers)
    model, loader = accelerator.prepare(peer.model(), loader)

    predictions = []
    for number, (images, _) in enumerate(loader):
        found = model(images.to(memory_format=torch.channels_last)).argmax(dim=1)
        predictions.append(accelerator.gather_for_metrics(found).cpu())
        # What was gathered is everybody's: it counts once.
        meter.add(len(predictions[-1]) if accelerator.is_main_process else 0)
        if number % CHECK_EVERY == 0:
            if meter.over:
                accelerator.set_trigger()
            if accelerator.check_trigger():
                break
    if accelerator.is_main_process:
        torch.save(torch.cat(predictions), "predictions.pt")
    meter.report("Accelerate")
    accelerator.end_training()


if __name__ == "__main__":
    main()
