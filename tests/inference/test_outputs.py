"""A model's return value becomes columns under the names that it gives them."""

from typing import Any

import pytest
import torch

from mgpu_ddp.config.schema import OutputConfig
from mgpu_ddp.inference.outputs import FINITE, SPLIT, OutputsError, to_columns


def test_a_column_may_be_named_as_what_is_noted_of_each_row() -> None:
    returned = {name.strip(): torch.full((2, 3), float("nan")) for name in (FINITE, SPLIT)}
    columns = to_columns(returned, 2, OutputConfig())
    assert columns["finite"].shape == columns["split"].shape == (2, 3)
    assert not columns[FINITE].any()


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([{"n": torch.tensor(1.0)}] * 2, "n must be a Tensor (k, ...) in each dict of a list, got float32 Tensor ()"),
        ([{"n": torch.ones(1)}, {"n": 1.0}], "n must be a Tensor (k, ...) in each dict of a list, got float"),
        (
            [{"n": torch.ones(1)}, {"n": torch.ones(1), "m": torch.ones(1)}],
            "the dicts of a list must have the same names, got ['n'] and ['n', 'm']",
        ),
        (
            [{"n": torch.ones(1), "m": torch.ones(1)}, {"n": torch.ones(1)}],
            "the dicts of a list must have the same names, got ['n', 'm'] and ['n']",
        ),
    ],
)
def test_the_dicts_of_a_list_have_the_same_names_and_hold_tensors_with_entries(
    rows: list[dict[str, Any]], why: str
) -> None:
    with pytest.raises(OutputsError) as raised:
        to_columns(rows, 2, OutputConfig())
    assert str(raised.value) == why
