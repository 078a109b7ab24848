"""Batches on their way through a GPU: what is waited for, and what is not."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mgpu_ddp.distributed.world import World
from mgpu_ddp.inference import pipeline
from mgpu_ddp.inference.clock import Clock
from mgpu_ddp.inference.gpu_input import STAGED, Ready
from mgpu_ddp.inference.pipeline import LAUNCH_S, GpuPipeline
from mgpu_ddp.loader.batch import Batch
from tests.inference.test_gpu_input import Decoding, pieces


@pytest.mark.parametrize("done_after", [100, 4, 0], ids=["slow model", "model that has caught up", "fast model"])
def test_the_loader_is_asked_for_more_while_the_model_runs(
    world: World, monkeypatch: pytest.MonkeyPatch, done_after: int
) -> None:
    """Else the decoder idles while batches that it has decoded go through the model one by one."""
    events = list[str]()

    class Flight:
        def __init__(self, _predictor: Any, _batch: Batch, ready: Ready) -> None:
            assert all(made is None for made in ready.made)
            events.append("launch")

        def done(self) -> bool:
            return events.count("take") >= done_after

        def land(self) -> tuple[dict[str, torch.Tensor], float]:
            events.append("land")
            return {}, 0.0

    def taken() -> Iterator[Batch]:
        for piece in pieces([256] * 9, 256):
            events.append("take")
            yield piece
            inputs.go.release()
            for future in [*runs._staging._begun]:
                future.result(timeout=60)

    inputs: Any = Decoding()
    monkeypatch.setattr(pipeline, "Flight", Flight)
    predictor: Any = SimpleNamespace(streams=1)
    runs = GpuPipeline(predictor, inputs, Clock(warm_up=1, began=0.0), world)
    runs._depth = 2
    seen = [int(batch.index[0]) for batch, _ in runs.run(taken())]
    assert seen == [256 * number for number in range(9)]
    words = " ".join(events)
    if done_after == 4:
        assert words.startswith("take take launch take launch take land launch"), "its rows wait for nothing else"
    elif done_after:
        # The model has two batches; then the input of others is made, and only then is the model waited for.
        assert words.startswith("take take launch take launch " + "take " * STAGED + "land launch take")
    else:
        assert words.startswith("take take launch land take launch land"), "no batch waits for those read ahead"


@pytest.mark.parametrize(("busy_s", "launched"), [(LAUNCH_S / 4, [256, 256, 160]), (LAUNCH_S, [64] * 10 + [32])])
def test_small_batches_are_launched_together_where_the_model_is_fast(
    world: World, monkeypatch: pytest.MonkeyPatch, busy_s: float, launched: list[int]
) -> None:
    """Python would need longer than the model, and a job that is stopped would wait for a slow one."""
    flown = list[tuple[list[int], list[float]]]()

    class Flight:
        def __init__(self, _predictor: Any, batch: Batch, ready: Ready) -> None:
            self._batch = batch
            flown.append((batch.index.tolist(), ready.images.flatten().tolist()))

        def done(self) -> bool:
            return True

        def land(self) -> tuple[dict[str, torch.Tensor], float]:
            return {}, busy_s * self._batch.rows / self._batch.batch_size

    def loaded() -> Iterator[Batch]:
        for piece in pieces([64] * 14 + [32], 256, batch_size=64):
            yield replace(piece, is_last=piece.is_last or len(piece.index) == 32)
            inputs.go.release()

    inputs: Any = Decoding()
    monkeypatch.setattr(pipeline, "Flight", Flight)
    predictor: Any = SimpleNamespace(streams=1)
    runs = GpuPipeline(predictor, inputs, Clock(warm_up=1, began=0.0), world)
    seen = [index for batch, _ in runs.run(loaded()) for index in batch.index.tolist()]
    assert seen == list(range(14 * 64 + 32))
    # Nothing is known of the model while the first ones are launched.
    assert [len(indices) for indices, _ in flown] == [64] * 4 + launched
    for indices, images in flown:
        # The images of these rows, and zeros where there are no more.
        assert images == indices + [0.0] * (len(images) - len(indices))
        assert len(images) == (64 if len(indices) <= 64 else 256)
