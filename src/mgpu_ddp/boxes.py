"""`mgpu_ddp.boxes_to_source`: boxes in a model's input, brought back to the pixels of the images they were found in."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from mgpu_ddp.config.checks import require
from mgpu_ddp.data.boxes import as_lists, read_boxes
from mgpu_ddp.data.encoded import SIZE
from mgpu_ddp.data.labels import is_text
from mgpu_ddp.errors import UsageError
from mgpu_ddp.preprocess.transform import Transform
from mgpu_ddp.run import Run


def boxes_to_source(run: Run | str | os.PathLike[str], table: Any = None, *, column: str = "boxes") -> Any:
    """Bring boxes in pixels of the model's input back to pixels of the upright images.

    `run` is a detector's run or its folder, with `output.fields=[size]`. `table` holds some of its rows, by default
    all: a pyarrow Table with `column` (lists of (x0, y0, x1, y1)), `width`, `height` and, where samples were boxes,
    `box`. Returns the table with that column in float64, null where it was: written as Parquet, it is a list for
    `data=list` with `data.box_column`. What lies in the padding of a crop comes out beyond its image.

    Raises:
        UsageError: the run has no sizes, or a transform that does not say how it resizes and crops.
    """
    import pyarrow as pa

    run = run if isinstance(run, Run) else Run(folder=Path(run).absolute())
    transform = transform_of(run)
    table = run.table() if table is None else table
    for name, remedy in (
        (column, "Give column=NAME."),
        *((name, "Predict with output.fields=[size].") for name in SIZE),
    ):
        require(name in table.column_names, "table", f"one with a column {name}", table.column_names, remedy)
    kind = table[column].type
    other = UsageError(
        f"column must be a column of lists of four numbers each, got {column!r} of {kind}. Name another."
    )
    if is_text(kind):
        # A column of a list that was carried.
        raise other
    try:
        counts, boxes = read_boxes([table[column]], str)
    except UsageError:
        raise other from None
    # Error rows have no boxes, and may have no size.
    size = np.stack([table[name].fill_null(1).to_numpy() for name in SIZE], axis=1)
    first = np.zeros(size.shape)
    if "box" in table.column_names:
        is_there, crops = read_boxes([table["box"]], str)
        corners = np.zeros((len(size), 2, 2))
        corners[is_there > 0] = np.nan_to_num(np.rint(crops)).reshape(-1, 2, 2)
        first, last = corners.clip(0, size[:, None]).transpose(1, 0, 2)
        size = np.maximum(last - first, 1)
    resized, corner = (each[::-1].T for each in transform.placed(size.T[::-1].astype(np.int64)))
    of_boxes: list[Any] = [np.repeat(each, counts, axis=0)[:, None] for each in (corner, size / resized, first)]
    source = (boxes.reshape(-1, 2, 2) + of_boxes[0]) * of_boxes[1] + of_boxes[2]
    lists = as_lists(counts, source.reshape(-1, 4), table[column].is_null().to_numpy())
    return table.set_column(table.column_names.index(column), column, pa.chunked_array([lists]))


def transform_of(run: Run) -> Transform:
    """The resizing and cropping of a run, as its manifest has it.

    Raises:
        UsageError: it is a function of the script's.
    """
    job = run.read_manifest().fingerprint
    resize, crop = job.get("transform.resize", ()), job.get("transform.crop")
    rule = "that of a job whose transform resizes and crops"
    remedy = "Give the script a preset of torchvision's, or the keys of the transform, in the place of a function."
    require(bool(resize), "run", rule, str(run.folder), remedy)
    return Transform(resize=tuple(resize), crop=tuple(crop) if isinstance(crop, list) else crop)
