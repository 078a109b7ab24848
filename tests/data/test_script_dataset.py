"""A script's dataset: what it may be, and the words for one that may not."""

from typing import Any

import numpy as np
import pytest
import torch

from mgpu_ddp.data.script_dataset import ScriptSamples, build_dataset, look_at
from mgpu_ddp.errors import UsageError
from mgpu_ddp.preprocess.transform import plain


class Items:
    """One item, or what a function makes of an index."""

    def __init__(self, item: Any = None, length: Any = 1) -> None:
        self.item, self.length = item, length

    def __len__(self) -> int:
        if isinstance(self.length, Exception):
            raise self.length
        return int(self.length)

    def __getitem__(self, index: int) -> Any:
        return self.item(index) if callable(self.item) else self.item


@pytest.mark.parametrize("length", [-1, OSError("no such table")])
def test_a_length_that_is_none_is_refused(length: Any) -> None:
    with pytest.raises(UsageError, match=r"^dataset must have a length, got Items \((Value|OS)Error: .*\)\. Give it"):
        build_dataset(lambda: Items(length=length))


def test_a_function_that_leaves_the_program_is_told() -> None:
    def leave() -> Any:
        raise SystemExit("no such table")

    with pytest.raises(UsageError, match=r"^dataset: the function raised SystemExit: no such table \(test_script_d"):
        build_dataset(leave)


def test_an_item_names_itself_by_its_key() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    assert look_at(Items({"image": image, "key": 7})).carried == {"path": "object"}
    with pytest.raises(UsageError, match="the item must give its path as 'key'"):
        look_at(Items({"image": image, "path": "a.jpg"}))


@pytest.mark.parametrize("first", [0, 3, 20])
def test_the_type_of_what_is_carried_may_be_known_only_later(first: int) -> None:
    """The first rows of a table may have nothing in a column."""

    def item(index: int) -> Any:
        known = index >= first
        return {"image": np.zeros((4, 4, 3), np.uint8), "year": 1990 if known else None, "by": "me" if known else None}

    if first < 16:
        assert look_at(Items(item, 40)).carried == {"year": "int64", "by": "object"}
    else:
        with pytest.raises(UsageError, match=r"^dataset must have a value for by, year in one of its first 16 items"):
            look_at(Items(item, 40))


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"label": 0.7}, "'label' must be a whole number, not 0.7"),
        ({"label": 2**31}, "'label' must be a number of 32 bits, not 2147483648"),
        ({"weight": 2**63}, "'weight' must be a number of 64 bits, not 9223372036854775808"),
    ],
)
def test_what_no_row_can_hold_is_told(values: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=rf"got item 0: TypeError: {why}"):
        look_at(Items({"image": np.zeros((4, 4, 3), np.uint8), **values}))


@pytest.mark.parametrize(
    ("item", "what"),
    [
        (np.zeros((3, 4, 5), np.uint8), r"uint8 \(3, 4, 5\)"),
        (torch.zeros(3, 4, 5, dtype=torch.int64), r"int64 \(3, 4, 5\)"),
        ((np.zeros((4, 5, 3), np.uint8), 1), "tuple"),
    ],
)
def test_what_is_no_image_is_told_with_its_shape(item: Any, what: str) -> None:
    with pytest.raises(UsageError, match=f"further scalars, not {what}$"):
        look_at(Items(item))


@pytest.mark.parametrize("label", [3, 3.0, np.int64(3), torch.tensor(3), "3"])
def test_any_whole_number_is_a_label(label: Any) -> None:
    assert rows_of({"image": np.zeros((4, 4, 3), np.uint8), "label": label}).known_label(0) == 3


def test_text_that_is_not_unicode_stays_readable() -> None:
    """As the names of files are, which `os.listdir` gives with surrogates."""
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    carried = rows_of({"image": np.zeros((4, 4, 3), np.uint8), "key": name, "by": name}).take_carried([0])
    assert [column[0] for column in carried.values()] == [r"caf\udce9.jpg"] * 2


def rows_of(item: dict[str, Any]) -> ScriptSamples:
    """The samples of a dataset of one item, which has been loaded."""
    samples = ScriptSamples(Items(item), look_at(Items(item)))
    samples.load(0, plain(4), lambda stage, spent_s: None)
    return samples
