"""Encoded images that a listing names: read, decoded and brought to size one by one, wherever their bytes lie."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mgpu_ddp.data import listing
from mgpu_ddp.data.listing import Listing
from mgpu_ddp.data.object_store import Ahead, Request
from mgpu_ddp.preprocess.transform import Pixels, StageClock, Transform, decode


class ImageSamples(ABC):
    """The images of a listing, in its order; a source says how the bytes of one are fetched."""

    layout = None

    def __init__(self, files: Listing, request: Request | None = None) -> None:
        """`request` begins to fetch an image that lies far away."""
        self.files = files
        self._ahead = Ahead(request) if request is not None else None

    @abstractmethod
    def fetch(self, index: int) -> bytes:
        """The encoded bytes of an image.

        Raises:
            StateError: the source is not what was listed, so that none of its images can be trusted. All else that
                it raises is this image's own.
        """

    def __len__(self) -> int:
        return len(self.files)

    @property
    def looks_ahead(self) -> bool:
        return self._ahead is not None

    def expect(self, indices: Sequence[int]) -> None:
        if self._ahead is not None:
            self._ahead.expect(indices)

    def read(self, index: int, clock: StageClock) -> bytes:
        started = time.perf_counter()
        data = self.fetch(index) if self._ahead is None else self._ahead.take(index)
        clock("read", time.perf_counter() - started)
        return data

    def load(
        self, index: int, transform: Transform, clock: StageClock, data: bytes | None = None
    ) -> tuple[Pixels, int]:
        if data is None:
            data = self.read(index, clock)
        started = time.perf_counter()
        image = decode(data)
        decoded = time.perf_counter()
        clock("decode", decoded - started)
        pixels = transform.geometry(image)
        clock("resize", time.perf_counter() - decoded)
        return pixels, self.known_label(index)

    def known_label(self, index: int) -> int:
        return self.files.label(index)

    def path(self, index: int) -> str | None:
        return listing.readable(self.files.path(index))

    def names(self, indices: npt.NDArray[np.int64]) -> Any:
        return self.files.names(indices)
