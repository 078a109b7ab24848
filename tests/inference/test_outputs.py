"""A model's return value becomes columns under the names that it gives them."""

from typing import Any

import pytest
import torch

from mgpu_ddp.config.schema import OutputConfig
from mgpu_ddp.inference.outputs import FINITE, SPLIT, OutputsError, to_columns, types_of_classes


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


def test_one_logit_is_a_probability_by_the_sigmoid() -> None:
    logits = torch.tensor([[-200.0], [-1.0], [0.5], [30.0], [float("nan")]])
    config = OutputConfig(fields=["topk", "logits", "probs"])
    columns = to_columns(logits, 5, config)
    sure = logits[:4, 0].sigmoid()
    assert columns["pred"].tolist()[:4] == [0, 0, 1, 1]
    assert torch.allclose(columns["probs"][:4], torch.stack([1 - sure, sure], 1))
    assert torch.equal(columns["prob"][:4], columns["probs"][:4].amax(1))
    assert columns["topk_index"].tolist()[:4] == [[0, 1], [0, 1], [1, 0], [1, 0]]
    assert torch.equal(columns["logits"][:4], logits[:4])
    assert columns[FINITE].tolist() == [True] * 4 + [False]
    for each in types_of_classes(config, 1, 0):
        assert tuple(columns[each.name].shape[1:]) == each.shape, each.name
