"""The seam between sources of images and everything that reads them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mgpu_ddp.preprocess.transform import AnyTransform, Layout, Pixels, StageClock, Window


class Samples(ABC):
    """A dataset of images: any index from 0 to len - 1, in any order, from any process.

    A source implements `__len__` and `load`. The rest says what a source may know besides; by default it is nothing.
    """

    layout: Layout | None = None
    """The layout of the stored images, where all are decoded and alike: a GPU can then transform them."""
    carried_bytes: int = 0
    """About how many bytes `carried` adds to a row."""
    looks_ahead: bool = False
    """Calling `expect` speeds up the next reads."""
    are_boxes: bool = False
    """A sample is a box of its image."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(
        self, index: int, transform: AnyTransform, clock: StageClock, data: bytes | None = None
    ) -> tuple[Pixels, int]:
        """Load one image after the transform's geometry, of its shape and dtype, and its label or -1.

        `data` is what `read` returned, where the caller has it already.
        """

    def read(self, index: int, clock: StageClock) -> bytes | None:
        """Read the encoded image; None from a source of decoded images."""
        return None

    def fill(self, indices: Sequence[int], transform: AnyTransform, pixels: Pixels, clock: StageClock) -> bool:
        """Copy images without labels into the first rows of a batch at once; False to have them loaded one by one."""
        return False

    def expect(self, indices: Sequence[int]) -> None:  # noqa: B027 (most sources need no notice)
        """Take note of what is read next, in this order."""

    def known_label(self, index: int) -> int:
        """The label as far as it is known without reading the image, or -1."""
        return -1

    def window(self, index: int, width: int, height: int) -> Window:
        """The pixels that are the sample, of its upright image of this size, which is noted for `take_carried`.

        Raises:
            ValueError: there are none.
        """
        return 0, 0, width, height

    def count_clipped(self, indices: Sequence[int]) -> int:
        """Count which of these samples, whose windows were asked for, reached beyond their image."""
        return 0

    def take_carried(self, indices: Sequence[int]) -> dict[str, npt.NDArray[np.generic]]:
        """Hand over what came along with samples that were loaded: masked arrays (n,), `path` the name of a row.

        Masked where there is nothing, as for a sample that could not be loaded.
        """
        return {}

    def carried(self, indices: npt.NDArray[np.int64]) -> dict[str, Any]:
        """The values that `data.carry` copies into these rows, an Arrow array or chunked array for each column.

        Called where rows are written, by one thread at a time, whatever became of the images.

        Raises:
            StateError: the source cannot be read, or is not what was listed.
        """
        return {}

    def path(self, index: int) -> str | None:
        """The name that a row carries, or None."""
        return None

    def names(self, indices: npt.NDArray[np.int64]) -> Any:
        """The names of several rows, an Arrow array of strings."""
        import pyarrow as pa

        return pa.array([self.path(index) for index in indices.tolist()], pa.string())


class ChosenSamples(Samples):
    """Some samples of a dataset, numbered from 0."""

    def __init__(self, samples: Samples, chosen: npt.NDArray[np.int64]) -> None:
        self._samples, self._chosen = samples, chosen
        self.layout, self.looks_ahead = samples.layout, samples.looks_ahead
        self.are_boxes = samples.are_boxes

    def __len__(self) -> int:
        return len(self._chosen)

    def load(
        self, index: int, transform: AnyTransform, clock: StageClock, data: bytes | None = None
    ) -> tuple[Pixels, int]:
        return self._samples.load(int(self._chosen[index]), transform, clock, data)

    def read(self, index: int, clock: StageClock) -> bytes | None:
        return self._samples.read(int(self._chosen[index]), clock)

    def fill(self, indices: Sequence[int], transform: AnyTransform, pixels: Pixels, clock: StageClock) -> bool:
        return self._samples.fill(self._chosen[list(indices)].tolist(), transform, pixels, clock)

    def expect(self, indices: Sequence[int]) -> None:
        self._samples.expect(self._chosen[list(indices)].tolist())

    def known_label(self, index: int) -> int:
        return self._samples.known_label(int(self._chosen[index]))

    def window(self, index: int, width: int, height: int) -> Window:
        return self._samples.window(int(self._chosen[index]), width, height)

    def count_clipped(self, indices: Sequence[int]) -> int:
        return self._samples.count_clipped(self._chosen[list(indices)].tolist())

    def take_carried(self, indices: Sequence[int]) -> dict[str, npt.NDArray[np.generic]]:
        return self._samples.take_carried(self._chosen[list(indices)].tolist())

    def path(self, index: int) -> str | None:
        return self._samples.path(int(self._chosen[index]))

    def names(self, indices: npt.NDArray[np.int64]) -> Any:
        return self._samples.names(self._chosen[indices])
