"""Random images: torchvision's FakeData."""

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mgpu_ddp.config.schema import FakeConfig
from mgpu_ddp.data.listing import no_names
from mgpu_ddp.data.samples import Samples
from mgpu_ddp.preprocess.transform import AnyTransform, Layout, Pixels, StageClock


class FakeSamples(Samples):
    """torchvision's FakeData, bit for bit, without its detour through PIL and the global random state.

    Source: torchvision.datasets.FakeData and transforms.functional.to_pil_image.
    """

    def __init__(self, config: FakeConfig) -> None:
        self._config = config
        self._generator = torch.Generator()
        self._noise = torch.empty(config.image_size)
        _, height, width = config.image_size
        self.layout = Layout(height=height, width=width, planar=True)

    def __len__(self) -> int:
        return self._config.size

    def load(
        self, index: int, transform: AnyTransform, clock: StageClock, data: bytes | None = None
    ) -> tuple[Pixels, int]:
        started = time.perf_counter()
        self._generator.manual_seed(index + self._config.random_offset)
        torch.randn(self._config.image_size, generator=self._generator, out=self._noise)
        label = int(torch.randint(0, self._config.num_classes, (1,), generator=self._generator))
        pixels = self._noise.mul_(255).byte().permute(1, 2, 0).expand(-1, -1, 3).numpy()
        generated = time.perf_counter()
        clock("generate", generated - started)
        pixels = transform.of_pixels(pixels)
        clock("resize", time.perf_counter() - generated)
        return pixels, label

    def names(self, indices: npt.NDArray[np.int64]) -> Any:
        return no_names(len(indices))
