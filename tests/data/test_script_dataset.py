"""What a script's dataset may be, and what is said of one that may not."""

from typing import Any

import numpy as np
import pytest

from mgpu_ddp.data.script_dataset import build_dataset, look_at
from mgpu_ddp.errors import UsageError


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
