"""Ray Data: read_images, a map that transforms, and map_batches with one actor per GPU.

Source: docs.ray.io, "Image Classification Batch Inference with PyTorch".
"""

import os

import numpy as np
import peer
import torch

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
import ray


class Classifier:
    """The model that an actor holds."""

    def __init__(self):
        self.device = torch.device("cuda" if peer.CUDA else "cpu")
        self.model = peer.model().to(self.device)

    @torch.inference_mode()
    def __call__(self, batch):
        images = torch.as_tensor(batch["image"], device=self.device).to(memory_format=torch.channels_last)
        with peer.autocast():
            return {"prediction": self.model(images).argmax(dim=1).cpu().numpy()}


def transform(row):
    from PIL import Image

    return {"image": np.asarray(peer.TRANSFORM(Image.fromarray(row["image"])))}


def main() -> None:
    args = peer.parse()
    meter = peer.Meter(args)
    # On a CPU an actor per core, and one per GPU besides the tasks that decode.
    actors = args.gpus if peer.CUDA else args.workers * args.gpus
    ray.init(
        num_cpus=args.workers * args.gpus + actors, include_dashboard=False, logging_level="error", log_to_driver=False
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    predictions = (
        ray.data.read_images(args.root, mode="RGB")
        .map(transform)
        .map_batches(
            Classifier,
            batch_size=args.batch_size,
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_gpus=1 if peer.CUDA else 0,
        )
    )
    for batch in predictions.iter_batches(batch_size=args.batch_size):
        meter.add(len(batch["prediction"]))
        if meter.over:
            break
    meter.report("Ray Data")


if __name__ == "__main__":
    main()
