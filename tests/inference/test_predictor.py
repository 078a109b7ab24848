"""The predictor meets outputs that are no numbers, and batches that do not fit in memory."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from mgpu_ddp.config.schema import Config, FakeConfig, ModelConfig, OutputConfig, TransformConfig
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import OutOfMemoryError
from mgpu_ddp.inference.clock import Clock
from mgpu_ddp.inference.outputs import FINITE
from mgpu_ddp.inference.pipeline import predict
from mgpu_ddp.inference.predictor import NONFINITE, Predictor
from mgpu_ddp.loader.batch import Batch
from mgpu_ddp.output.columns import Ragged
from mgpu_ddp.output.rows import Rows, concatenate
from mgpu_ddp.preprocess.transform import plain
from tests.support.choices import resolved

SIDE, CLASSES = 2, 4
TOO_MUCH = 2**46
"""Bytes that no machine has."""


class Sums(nn.Module):
    """Logits from the sum of an image's values; `hungry(n)` bytes are allocated on the way for n images."""

    def __init__(self, hungry: int | None = None, poison: float | None = None) -> None:
        super().__init__()
        self.hungry, self.poison = hungry, poison
        self.sizes: list[int] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.hungry is not None and len(images) > self.hungry:
            torch.empty(TOO_MUCH, dtype=torch.uint8)
        self.sizes.append(len(images))
        sums = images.sum(dim=(1, 2, 3))
        logits = sums[:, None] * torch.arange(CLASSES)
        if self.poison is not None:
            logits[sums.round() == 3, 1] = self.poison
        return logits


def batches(batch_size: int, count: int) -> Iterator[Batch]:
    """Images whose every value is their index; the last two samples of each batch are missing, sample 1 is bad."""
    for first in range(0, count * (batch_size - 2), batch_size - 2):
        index = np.arange(first, first + batch_size - 2)
        pixels = torch.zeros(batch_size, SIDE, SIDE, 3, dtype=torch.uint8)
        pixels[: len(index)] = torch.from_numpy(index.astype(np.uint8) * 21)[:, None, None, None]
        errors = {1: "broken"} if first == 0 else {}
        yield Batch(
            index=index,
            label=index.astype(np.int32),
            pixels=pixels,
            jpegs=None,
            errors=errors,
            seconds={},
            batch_size=len(pixels),
            rows=len(pixels),
        )


def run(module: nn.Module, world: World, batch_size: int) -> tuple[Rows, Clock]:
    output = OutputConfig(topk=2, fields=["topk", "logits"])
    config = Config(data=FakeConfig(), transform=TransformConfig(), model=ModelConfig(), output=output)
    predictor = Predictor(module, config, resolved(transform=plain(SIDE)), world.device)
    clock = Clock(warm_up=1, began=0.0)
    return concatenate(list(predict(batches(batch_size, 2), predictor, clock, world))), clock


def test_a_batch_that_does_not_fit_is_halved_until_it_does(world: World) -> None:
    whole, calm = run(Sums(), world, 8)
    hungry = Sums(hungry=2)
    rows, clock = run(hungry, world, 8)
    assert set(hungry.sizes) == {2}
    assert np.array_equal(rows.index, whole.index)
    for name, column in whole.columns.items():
        assert np.array_equal(rows.columns[name], column), name
    assert (rows.errors, rows.split) == (whole.errors, frozenset(range(12)))
    assert (clock.split_rows, calm.split_rows, whole.split) == (12, 0, frozenset())


class Boxes(nn.Module):
    """As many boxes an image as its values say, in as many rows of a dict each; hungry as `Sums` is."""

    def __init__(self, hungry: int | None = None) -> None:
        super().__init__()
        self.sums = Sums(hungry)

    def forward(self, images: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        sums = self.sums(images)[:, 1]
        return [{"boxes": torch.full((int(s) % 4, 4), float(s)), "ids": torch.arange(int(s) % 4)} for s in sums]


def test_rows_of_any_length_survive_a_batch_that_is_halved(world: World) -> None:
    whole, _ = run(Boxes(), world, 8)
    rows, _ = run(Boxes(hungry=2), world, 8)
    assert rows.split == frozenset(range(12))
    for name in ("boxes", "ids"):
        mine, other = whole.columns[name], rows.columns[name]
        assert isinstance(mine, Ragged)
        assert isinstance(other, Ragged)
        assert len(set(mine.lengths.tolist())) > 1
        assert np.array_equal(mine.lengths, other.lengths)
        assert np.array_equal(mine.values, other.values)


def test_an_odd_batch_is_halved_down_to_single_images(world: World) -> None:
    hungry = Sums(hungry=1)
    rows, _ = run(hungry, world, 5)
    assert set(hungry.sizes) == {1}
    assert np.array_equal(rows.columns["logits"], run(Sums(), world, 5)[0].columns["logits"])


def test_a_single_image_that_does_not_fit_ends_the_job(world: World) -> None:
    with pytest.raises(OutOfMemoryError, match=r"batch_size must fit into memory, got 1 \(.*DefaultCPUAllocator"):
        run(Sums(hungry=0), world, 4)


def test_other_errors_are_not_taken_for_a_lack_of_memory(world: World) -> None:
    with pytest.raises(RuntimeError, match="shape"):
        run(nn.Linear(3, 4), world, 4)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_outputs_that_are_no_numbers_become_error_rows(world: World, poison: float) -> None:
    rows, clock = run(Sums(poison=poison), world, 8)
    sick = [i for i in range(12) if round(i * 21 / 255 * SIDE * SIDE * 3) == 3]
    assert len(sick) == 1
    assert rows.errors == {1: "broken", sick[0]: NONFINITE}
    assert (clock.errors, clock.nonfinite) == (2, 1)
    assert FINITE not in rows.columns
