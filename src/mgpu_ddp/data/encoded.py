"""Encoded images that a listing names, wherever their bytes lie: read, decoded and brought to size one by one."""

import time
from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mgpu_ddp.data.boxes import window_of
from mgpu_ddp.data.listing import Listing, readable
from mgpu_ddp.data.read_ahead import ReadAhead, Request
from mgpu_ddp.data.samples import Samples
from mgpu_ddp.preprocess.transform import AnyTransform, Pixels, StageClock, Window, decode, size_of

SIZE = ("width", "height")
"""The columns of `output.fields=[size]`."""


class EncodedSamples(Samples):
    """The images of a listing, in its order. A source implements `fetch`."""

    def __init__(self, files: Listing, request: Request | None = None) -> None:
        """With a `request`, which starts to fetch an image over the network, `fetch` is not called."""
        self.files = files
        self.are_boxes = files.boxes is not None
        self.has_size = False
        """Rows carry the size of the image, width and height."""
        self._last_file: tuple[Hashable, bytes] | None = None
        self._last_image: tuple[Hashable, Image.Image] | None = None
        """The file and the image that were used last, by `image_of`: the next box may be one of the same."""
        self._sizes_of: dict[int, tuple[int, int]] = {}
        self._clipped: set[int] = set()
        """Sizes and clipped boxes of samples whose windows were asked for, until they are taken."""
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

    def image_of(self, index: int) -> Hashable:
        """Tell the image of a sample from others."""
        return self.files.path(index)

    def expect(self, indices: Sequence[int]) -> None:
        if self._ahead is not None:
            images = [self.image_of(index) for index in indices] if self.are_boxes else indices
            before = [self._last_file and self._last_file[0], *images]
            # The first box brings its image for those after it.
            self._ahead.expect(index for index, *two in zip(indices, images, before, strict=False) if two[0] != two[1])

    def read(self, index: int, clock: StageClock) -> bytes:
        image = self.image_of(index) if self.are_boxes else None
        if self._last_file is not None and self._last_file[0] == image:
            return self._last_file[1]
        started = time.perf_counter()
        data = self.fetch(index) if self._ahead is None else self._ahead.take(index)
        clock("read", time.perf_counter() - started)
        if self.are_boxes:
            self._last_file = image, data
        return data

    def load(
        self, index: int, transform: AnyTransform, clock: StageClock, data: bytes | None = None
    ) -> tuple[Pixels, int]:
        name = self.image_of(index) if self.are_boxes else None
        if self._last_image is not None and self._last_image[0] == name:
            image = self._last_image[1]
        else:
            data = data if data is not None else self.read(index, clock)
            started = time.perf_counter()
            image = decode(data, transform.decoded_side)
            clock("decode", time.perf_counter() - started)
        size = image.size
        if self.are_boxes:
            self._last_image = name, image
        elif self.has_size and transform.decoded_side is not None and data is not None:
            size = size_of(data) or size
        window = self.window(index, *size)
        started = time.perf_counter()
        pixels = transform.geometry(image.crop(window) if self.are_boxes else image)
        clock("resize", time.perf_counter() - started)
        return pixels, self.known_label(index)

    def window(self, index: int, width: int, height: int) -> Window:
        if self.has_size:
            self._sizes_of[index] = width, height
        if self.files.boxes is None:
            return 0, 0, width, height
        window, is_clipped = window_of(self.files.boxes[index].tolist(), width, height)
        if is_clipped:
            self._clipped.add(index)
        return window

    def count_clipped(self, indices: Sequence[int]) -> int:
        clipped, self._clipped = self._clipped, set()
        return len(clipped.intersection(indices))

    def take_carried(self, indices: Sequence[int]) -> dict[str, npt.NDArray[np.generic]]:
        carried: dict[str, npt.NDArray[np.generic]] = {}
        if self.files.boxes is not None:
            carried["box"] = np.ma.MaskedArray(self.files.boxes[list(indices)])
        if self.has_size:
            sizes, self._sizes_of = self._sizes_of, {}
            both = np.array([sizes.get(index, (0, 0)) for index in indices], np.int32).reshape(-1, 2)
            carried |= {name: np.ma.masked_equal(both[:, axis], 0) for axis, name in enumerate(SIZE)}
        return carried

    def known_label(self, index: int) -> int:
        return self.files.label(index)

    def carried(self, indices: npt.NDArray[np.int64]) -> dict[str, Any]:
        return self.files.carried_of(indices)

    def path(self, index: int) -> str | None:
        return readable(self.files.path(index))

    def names(self, indices: npt.NDArray[np.int64]) -> Any:
        return self.files.names(indices)
