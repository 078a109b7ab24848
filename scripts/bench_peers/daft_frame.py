"""Daft: a frame of paths, downloaded and decoded by its expressions, and a class UDF that holds the model.

Source: docs.daft.ai, "Working with images" and "User-defined functions".
"""

import os

import numpy as np
import peer
import torch

os.environ.setdefault("DAFT_ANALYTICS_ENABLED", "0")
os.environ.setdefault("DO_NOT_TRACK", "1")
import daft
from PIL import Image


@daft.func.batch(return_dtype=daft.DataType.tensor(daft.DataType.float32(), shape=(3, 224, 224)))
def transform(images):
    return [np.asarray(peer.TRANSFORM(Image.fromarray(image))) for image in images.to_pylist()]


@daft.cls(gpus=1 if peer.CUDA else 0)
class Classifier:
    """What a worker holds."""

    def __init__(self):
        self.device = torch.device("cuda" if peer.CUDA else "cpu")
        self.model = peer.model().to(self.device)

    @daft.method.batch(return_dtype=daft.DataType.int64())
    @torch.inference_mode()
    def predict(self, images):
        batch = torch.from_numpy(np.stack(images.to_pylist())).to(self.device)
        with peer.autocast():
            return self.model(batch.to(memory_format=torch.channels_last)).argmax(dim=1).cpu().numpy()


def main() -> None:
    args = peer.parse()
    meter = peer.Meter(args)
    frame = daft.from_glob_path(os.path.join(args.root, "**", "*.jpg")).into_batches(args.batch_size)
    frame = frame.with_column("image", daft.col("path").download().decode_image(mode="RGB"))
    frame = frame.with_column("input", transform(daft.col("image")))
    frame = frame.select("path", Classifier().predict(daft.col("input")).alias("prediction"))
    for part in frame.iter_partitions():
        meter.add(len(part))
        if meter.over:
            break
    meter.report("Daft")


if __name__ == "__main__":
    main()
