"""What a model returns becomes columns under the names that it gives them."""

import torch

from mgpu_ddp.config.schema import OutputConfig
from mgpu_ddp.inference.outputs import FINITE, SPLIT, to_columns


def test_a_column_may_be_named_as_what_is_noted_of_each_row() -> None:
    returned = {name.strip(): torch.full((2, 3), float("nan")) for name in (FINITE, SPLIT)}
    columns = to_columns(returned, 2, OutputConfig())
    assert columns["finite"].shape == columns["split"].shape == (2, 3)
    assert not columns[FINITE].any()
