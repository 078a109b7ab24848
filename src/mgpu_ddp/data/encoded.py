"""Encoded images that a listing names, wherever their bytes lie: read, decoded and brought to size one by one."""

import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mgpu_ddp.data.listing import Listing, readable
from mgpu_ddp.data.read_ahead import ReadAhead, Request
from mgpu_ddp.data.samples import Samples
from mgpu_ddp.preprocess.transform import AnyTransform, Pixels, StageClock, decode


class EncodedSamples(Samples):
    """The images of a listing, in its order. A source implements `fetch`."""

    def __init__(self, files: Listing, request: Request | None = None) -> None:
        """With a `request`, which starts to fetch an image over the network, `fetch` is not called."""
        self.files = files
        self._ahead = ReadAhead(request) if request is not None else None
        self.looks_ahead = self._ahead is not None
        self.carried_bytes = files.carried_bytes

    @abstractmethod
    def fetch(self, index: int) -> bytes:
        """Fetch the encoded bytes of an image.

        Raises:
            StateError: the source is not what was listed, so that none of its images can be trusted. Any other
                exception makes an error row of this image alone.
        """

    def __len__(self) -> int:
        return len(self.files)

    def expect(self, indices: Sequence[int]) -> None:
        if self._ahead is not None:
            self._ahead.expect(indices)

    def read(self, index: int, clock: StageClock) -> bytes:
        started = time.perf_counter()
        data = self.fetch(index) if self._ahead is None else self._ahead.take(index)
        clock("read", time.perf_counter() - started)
        return data

    def load(
        self, index: int, transform: AnyTransform, clock: StageClock, data: bytes | None = None
    ) -> tuple[Pixels, int]:
        if data is None:
            data = self.read(index, clock)
        started = time.perf_counter()
        image = decode(data, transform.decoded_side)
        decoded = time.perf_counter()
        clock("decode", decoded - started)
        pixels = transform.geometry(image)
        clock("resize", time.perf_counter() - decoded)
        return pixels, self.known_label(index)

    def known_label(self, index: int) -> int:
        return self.files.label(index)

    def carried(self, indices: npt.NDArray[np.int64]) -> dict[str, Any]:
        return self.files.carried_of(indices)

    def path(self, index: int) -> str | None:
        return readable(self.files.path(index))

    def names(self, indices: npt.NDArray[np.int64]) -> Any:
        return self.files.names(indices)
