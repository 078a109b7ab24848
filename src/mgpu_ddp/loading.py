"""Loader workers → batches: decode in parallel, pad to the batch size, keep bad samples apart."""

import signal
import time
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import BatchSampler, DataLoader, Dataset

from mgpu_ddp.config import LoaderConfig
from mgpu_ddp.datasets import Samples
from mgpu_ddp.errors import StateError
from mgpu_ddp.preprocess import Transform
from mgpu_ddp.sharding import ShardSampler
from mgpu_ddp.signals import leave_stopping_to_parent
from mgpu_ddp.world import World


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """n samples on their way to the model.

    `pixels`: uint8 (batch_size, height, width, 3); rows past n and rows of bad samples are zeros. `index`:
    int64 (n,). `label`: int32 (n,). `errors`: dataset index → reason. `seconds`: worker time per stage.
    """

    index: npt.NDArray[np.int64]
    label: npt.NDArray[np.int32]
    pixels: torch.Tensor
    errors: dict[int, str]
    seconds: dict[str, float]

    def pin_memory(self) -> "Batch":
        return Batch(
            index=self.index,
            label=self.label,
            pixels=self.pixels.pin_memory(),
            errors=self.errors,
            seconds=self.seconds,
        )


class BatchMaker(Dataset[Batch]):
    """What runs in a worker: a list of indices in, one padded batch out."""

    def __init__(self, samples: Samples, transform: Transform, batch_size: int, timeout_s: float) -> None:
        self._samples, self._transform = samples, transform
        self._shape = (batch_size, *transform.out_size, 3)
        self._timeout_s = timeout_s

    def __getitems__(self, indices: list[int]) -> Batch:
        pixels = torch.zeros(self._shape, dtype=torch.uint8)
        view = pixels.numpy()
        labels = np.full(len(indices), -1, dtype=np.int32)
        errors: dict[int, str] = {}
        seconds: dict[str, float] = {}

        def clock(stage: str, spent_s: float) -> None:
            seconds[stage] = seconds.get(stage, 0.0) + spent_s

        for place, index in enumerate(indices):
            try:
                with _time_limit(self._timeout_s):
                    view[place], labels[place] = self._samples.load(index, self._transform, clock)
            except (Exception, TookTooLongError) as error:  # decoders raise all kinds; each bad image is one row
                view[place] = 0
                labels[place] = self._samples.known_label(index)
                errors[index] = _reason(error)
        return Batch(
            index=np.asarray(indices, dtype=np.int64),
            label=labels,
            pixels=pixels,
            errors=errors,
            seconds=seconds,
        )


class TookTooLongError(BaseException):
    """A sample's time is over. No Exception, so that no decoder's own `except Exception` can swallow it."""


def _reason(error: BaseException) -> str:
    """Why a sample has no prediction, in words, without the path: the row carries that."""
    if isinstance(error, UnidentifiedImageError):
        return "UnidentifiedImageError: empty, or not an image in an allowed format"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    kind = TimeoutError if isinstance(error, TookTooLongError) else type(error)
    return " ".join(f"{kind.__name__}: {text}".split())[:500]


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise in the block once it has taken too long (a stuck network mount, say)."""

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise TookTooLongError(f"took longer than loader.timeout_s={seconds:g}")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _start_worker(_number: int) -> None:
    leave_stopping_to_parent()
    torch.set_num_threads(1)


def num_workers(config: LoaderConfig, world: World) -> int:
    """`loader.workers` with auto decided: the CPUs this process may use, shared among the ranks of its host."""
    return world.share_of_cpus if config.workers == "auto" else int(config.workers)


def load_batches(
    samples: Samples,
    sampler: ShardSampler,
    transform: Transform,
    config: LoaderConfig,
    batch_size: int,
    world: World,
) -> Generator[tuple[Batch, float]]:
    """This rank's samples in order, read ahead of the model; each batch with the seconds its consumer waited."""
    workers = num_workers(config, world)
    # Pillow warns from here on and refuses at twice as much. Workers inherit it.
    Image.MAX_IMAGE_PIXELS = config.max_pixels // 2
    maker = BatchMaker(samples, transform, batch_size, config.timeout_s)
    # Forked workers start at once and inherit what is imported; a spawned one would import torch again for seconds.
    ahead: dict[str, Any] = {
        "prefetch_factor": config.prefetch,
        "worker_init_fn": _start_worker,
        "multiprocessing_context": "fork",
    }
    loader = DataLoader(
        maker,
        batch_sampler=BatchSampler(sampler, batch_size, drop_last=False),
        num_workers=workers,
        collate_fn=_as_made,
        pin_memory=world.device.type == "cuda",
        **(ahead if workers else {}),
    )
    with warnings.catch_warnings():
        # Workers are forked beside the pulse thread: they use neither its store client nor CUDA nor gloo.
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork.*", category=DeprecationWarning)
        started = time.perf_counter()
        batches = iter(loader)
    try:
        for batch in batches:
            yield batch, time.perf_counter() - started
            started = time.perf_counter()
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        first = str(error).splitlines()[0]
        raise StateError(f"loader workers must live, got: {first} Look for what killed it; lack of memory?") from error
    finally:
        # Ends the workers now, and not when the garbage collector comes by.
        del batches


def _as_made(batch: Any) -> Batch:
    assert isinstance(batch, Batch)
    return batch
