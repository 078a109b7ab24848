"""CUDA graphs: a step's kernels, recorded once and launched together, where launching them one by one is the limit."""

import logging
from collections.abc import Callable

import torch

from mgpu_ddp.inference.outputs import Columns, RaggedTensor

log = logging.getLogger("mgpu_ddp")

LARGEST_BATCH = 256
"""With more images, kernels take longer than their launches, and a graph would only hold memory."""
EAGER_STEPS = 16
"""Steps before it is recorded: a short job would not win back what recording costs."""


class Replayed:
    """A step for CUDA tensors that is recorded once it is worth it: the same kernels, and so the same bits.

    A recording whose first replay gives other bits is not used. What a call returns is valid until the next call, for
    work on the current stream.
    """

    def __init__(self, step: Callable[[torch.Tensor, int], Columns]) -> None:
        """`step` takes images and a batch size, as a call does."""
        self._step, self._eager_steps = step, 0
        self._shape: tuple[torch.Size, torch.dtype, int] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_recorded = False
        self._images: torch.Tensor
        self._columns: Columns

    def __call__(self, images: torch.Tensor, batch_size: int) -> Columns:
        if len(images) > LARGEST_BATCH:
            return self._step(images, batch_size)
        shape = images.shape, images.dtype, batch_size
        if shape != self._shape:
            # Batches of a sweep's next job, or halves of one that did not fit into memory.
            if self._graph is not None:
                # Kernels may still use its memory.
                torch.cuda.current_stream(images.device).synchronize()
            self._shape, self._eager_steps, self._graph, self._is_recorded = shape, 0, None, False
        if not self._is_recorded and self._eager_steps == EAGER_STEPS:
            self._is_recorded = True
            return self._record(images, batch_size)
        if self._graph is None:
            self._eager_steps += 1
            return self._step(images, batch_size)
        self._images.copy_(images)
        self._graph.replay()
        return self._columns

    def _record(self, images: torch.Tensor, batch_size: int) -> Columns:
        self._images = images.clone()
        # Whatever compiles for these very images does so now, and not while they are recorded.
        expected = self._step(self._images, batch_size)
        graph = torch.cuda.CUDAGraph()
        # Other threads decode, and allocate, in the meantime.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._columns = self._step(self._images, batch_size)
        graph.replay()
        if all(_are_equal(self._columns[name], column) for name, column in expected.items()):
            self._graph = graph
        else:
            log.warning("a CUDA graph of the model does not give its bits: its kernels are launched one by one")
        return expected


def _are_equal(mine: torch.Tensor | RaggedTensor, other: torch.Tensor | RaggedTensor) -> bool:
    if isinstance(mine, RaggedTensor) and isinstance(other, RaggedTensor):
        return mine.lengths == other.lengths and _are_equal(mine.values, other.values)
    if not (isinstance(mine, torch.Tensor) and isinstance(other, torch.Tensor) and mine.shape == other.shape):
        return False
    # NaN is not equal to itself.
    return bool(((mine == other) | ((mine != mine) & (other != other))).all())
