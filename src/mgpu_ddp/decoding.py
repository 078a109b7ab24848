"""Batches → model input on a GPU, on a stream and in a thread of their own, while the model runs the batch before.

nvJPEG decodes whole batches, by torchvision, and one kernel makes model input of them. What it refuses, Pillow
decodes here, as the loader's workers do with all that does not look like a plain JPEG.
"""

import time
import warnings
from collections.abc import Callable

import numpy as np
import torch

from mgpu_ddp.config import Config, require
from mgpu_ddp.loading import Batch, Jpegs, reason_of
from mgpu_ddp.preprocess import Transform, decode

MAX_DECODED_PIXELS = 1 << 30
"""That are decoded at once, to bound memory: three bytes each."""


def decode_of(config: Config, device: torch.device) -> str:
    """`runtime.decode` with auto decided: gpu where there is one and images come as files.

    Raises:
        UsageError: the GPU was asked for in vain.
    """
    may, wanted = device.type == "cuda" and config.data.name == "folder", config.runtime.decode
    rule = "cpu or auto but for image files on a CUDA device"
    require(may or wanted != "gpu", "runtime.decode", rule, wanted, "Leave it out.")
    return "gpu" if may and wanted != "cpu" else "cpu"


class GpuInput:
    """Makes model input of batches. The tensor that comes back is ready once the current stream gets to it."""

    def __init__(self, transform: Transform, device: torch.device, dtype: torch.dtype, *, channels_last: bool) -> None:
        self._transform, self._device, self._dtype = transform, device, dtype
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        # Work that is queued on another stream must not be overtaken by nvJPEG, which has streams of its own.
        self._stream = torch.cuda.Stream(device)

    @torch.inference_mode()
    def __call__(self, batch: Batch, clock: Callable[[str, float], None]) -> tuple[torch.Tensor, torch.cuda.Event]:
        """Model input (batch_size, 3, height, width) of a batch; bad samples that show up are added to its errors."""
        started = time.perf_counter()
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            images = self._upload(batch) if batch.jpegs is None else self._decode_all(batch, batch.jpegs)
            done = torch.cuda.Event()
            done.record()
        clock("gpu input", time.perf_counter() - started)
        return images, done

    def _upload(self, batch: Batch) -> torch.Tensor:
        return self._normalise(batch.pixels.to(self._device, non_blocking=True))

    def _normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        channels_last = self._layout is torch.channels_last
        return self._transform.normalise(pixels, dtype=self._dtype, channels_last=channels_last)

    def _decode_all(self, batch: Batch, jpegs: Jpegs) -> torch.Tensor:
        from mgpu_ddp.kernels import preprocess_images

        shape = (len(batch.pixels), 3, *self._transform.out_size)
        images = torch.empty(shape, dtype=self._dtype, device=self._device, memory_format=self._layout).zero_()
        refused: list[int] = []
        for numbers in _portions(jpegs.sizes):
            decoded = self._decode([jpegs.data[i] for i in numbers])
            good = [(i, image) for i, image in zip(numbers, decoded, strict=True) if image is not None]
            refused += [i for i, image in zip(numbers, decoded, strict=True) if image is None]
            preprocess_images(
                [image for _, image in good],
                [jpegs.orientations[i] for i, _ in good],
                self._transform,
                out=images,
                places=[jpegs.places[i] for i, _ in good],
            )
        for i in refused:
            self._decode_on_cpu(batch, jpegs, i)
        ready = sorted(set(range(len(batch.index))) - set(jpegs.places) | {jpegs.places[i] for i in refused})
        if ready:
            pixels = batch.pixels[ready].to(self._device)
            images[torch.tensor(ready, device=self._device)] = self._normalise(pixels)
        return images

    def _decode(self, data: list[torch.Tensor]) -> list[torch.Tensor | None]:
        """uint8 (3, height, width) on the device each; None for what the decoder refuses."""
        from torchvision.io import ImageReadMode, decode_jpeg

        try:
            with warnings.catch_warnings():
                # torchvision means to drop its decoders one day; until then they are what a plain install brings.
                warnings.simplefilter("ignore")
                return list(decode_jpeg(data, mode=ImageReadMode.RGB, device=self._device))
        except RuntimeError:
            # One refused image fails the call: halve until it stands alone.
            if len(data) == 1:
                return [None]
        half = len(data) // 2
        return self._decode(data[:half]) + self._decode(data[half:])

    def _decode_on_cpu(self, batch: Batch, jpegs: Jpegs, number: int) -> None:
        place = jpegs.places[number]
        try:
            pixels = self._transform.geometry(decode(jpegs.data[number].numpy().tobytes()))
            batch.pixels[place] = torch.from_numpy(np.ascontiguousarray(pixels))
        except Exception as error:  # decoders raise all kinds; each bad image is one row
            batch.errors[int(batch.index[place])] = reason_of(error)


def _portions(sizes: list[int]) -> list[list[int]]:
    """Runs of images that together stay within `MAX_DECODED_PIXELS`, or hold one image."""
    portions: list[list[int]] = []
    left = 0
    for number, size in enumerate(sizes):
        if size > left or not portions:
            portions.append([])
            left = MAX_DECODED_PIXELS
        portions[-1].append(number)
        left -= size
    return portions
