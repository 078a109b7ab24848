"""The checks before a run folder is claimed."""

from types import SimpleNamespace
from typing import Any

import pytest

from mgpu_ddp.data.script_dataset import ItemKind, ScriptDataset
from mgpu_ddp.errors import UsageError
from mgpu_ddp.job.setup import check_carried
from mgpu_ddp.output.columns import ColumnType


@pytest.mark.parametrize("name", ["index", "pred", "error", "logits"])
def test_what_a_dataset_carries_has_names_of_its_own(name: str) -> None:
    def setup(carried: str) -> Any:
        kind = ItemKind(image="pixels", carried={"path": "object", carried: "float64"})
        types = (ColumnType(name="logits", dtype="float32", shape=(3,)),)
        return SimpleNamespace(files=ScriptDataset(dataset=[], kind=kind, in_shards=False), types=types)

    check_carried(setup("taken"))
    with pytest.raises(UsageError, match=f"named otherwise than the columns error, .*, got '{name}'. Rename it."):
        check_carried(setup(name))
