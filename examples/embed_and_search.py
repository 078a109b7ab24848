r"""Nearest neighbours of an image, by embeddings of a timm model: embed once, then search as often as you like.

mgpu-infer model=timm model.name=vit_small_patch16_224.augreg_in21k_ft_in1k \
    data=folder data.root=photos output.fields=[embedding] output.dir=embedded
python examples/embed_and_search.py embedded photos cats/1.jpg neighbours.png
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from matplotlib import pyplot
from PIL import Image

NEIGHBOURS = 5


def read(folder: str) -> tuple[list[str], np.ndarray]:
    """The paths of a run, and their embeddings, each of length one."""
    table = pq.read_table(f"{folder}/predictions", columns=["path", "embedding", "error"])
    table = table.filter(pc.is_null(table["error"]))
    embeddings = np.stack(table["embedding"].to_numpy())
    return table["path"].to_pylist(), embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def search(paths: list[str], embeddings: np.ndarray, wanted: str) -> list[tuple[str, float]]:
    """The image itself and those nearest to it, with their cosine similarities."""
    similarities = embeddings @ embeddings[paths.index(wanted)]
    nearest = np.argsort(-similarities, kind="stable")[: NEIGHBOURS + 1]
    return [(paths[i], float(similarities[i])) for i in nearest]


if __name__ == "__main__":
    folder, photos, wanted, picture = sys.argv[1:]
    found = search(*read(folder), wanted)
    figure, axes = pyplot.subplots(1, len(found), figsize=(2 * len(found), 2.5))
    for axis, (path, similarity) in zip(axes, found, strict=True):
        axis.imshow(Image.open(Path(photos) / path))
        axis.set_title(f"{similarity:.3f}")
        axis.axis("off")
        print(f"{similarity:.3f}  {path}")
    figure.savefig(picture, dpi=100)
