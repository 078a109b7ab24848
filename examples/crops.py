"""A detector, then a classifier over what it found, each on all GPUs, with one row per image and one per crop:

python crops.py photos out

OUT/found has the detections of every image, OUT/crops a class for every detection, with its `path` and `box`. Started
again, both go on where they stopped.
"""

import os
import sys

import pyarrow.parquet as pq
from detector import build_model, build_transform, keep_likely

import mgpu_ddp

CLASSIFIER = os.environ.get("CLASSIFIER", "resnet50")
WEIGHTS = os.environ.get("WEIGHTS", "DEFAULT")
"""Of the classifier: a name, or the path of a checkpoint."""


def main(photos: str, out: str) -> None:
    found = mgpu_ddp.predict(
        model=build_model,
        transform=build_transform,
        outputs=keep_likely,
        data=photos,
        output_dir=f"{out}/found",
        output={"fields": ["size"]},
    )
    # From pixels of the square that the detector has seen to those of the photos.
    boxes = mgpu_ddp.boxes_to_source(found)
    if not sum(map(len, filter(None, boxes["boxes"].to_pylist()))):
        print(f"{found.summary['rows']} images, and nothing found in them")
        return
    pq.write_table(boxes.select(["path", "boxes"]), f"{out}/boxes.parquet")
    crops = mgpu_ddp.predict(
        data="list",
        output_dir=f"{out}/crops",
        **{"data.path": f"{out}/boxes.parquet", "data.root": photos, "data.box_column": "boxes"},
        **{"model.name": CLASSIFIER, "model.weights": WEIGHTS},
    )
    print(f"{found.summary['rows']} images, {crops.summary['rows']} crops")


if __name__ == "__main__":
    main(*sys.argv[1:])
