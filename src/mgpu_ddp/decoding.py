"""Batches → model input on a GPU, on streams and in threads of their own, while the model runs the batch before.

nvJPEG decodes whole batches, by torchvision, and one kernel makes model input of them. What it refuses, Pillow
decodes here, as the loader's workers do with all that does not look like a plain JPEG.
"""

import itertools
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from mgpu_ddp.config import Config, Listed, require
from mgpu_ddp.loading import Batch, Jpegs, reason_of
from mgpu_ddp.preprocess import Transform, decode, imagenet

MAX_DECODED_PIXELS = 1 << 30
"""That are decoded at once, to bound memory: three bytes each."""


def decode_of(config: Config, device: torch.device) -> str:
    """`runtime.decode` with auto decided: gpu where there is one and images come as files.

    Raises:
        UsageError: the GPU was asked for in vain.
    """
    may, wanted = device.type == "cuda" and isinstance(config.data, Listed), config.runtime.decode
    rule = "cpu or auto but for image files on a CUDA device"
    require(may or wanted != "gpu", "runtime.decode", rule, wanted, "Leave it out.")
    return "gpu" if may and wanted != "cpu" else "cpu"


def warm_up(device: torch.device) -> Future[None]:
    """Start what the first batch would wait for, beside other work: the device, the decoder and the kernel."""

    def run() -> None:
        from torchvision.io import encode_jpeg

        from mgpu_ddp.kernels import preprocess_images

        transform, jpeg = imagenet(224), encode_jpeg(torch.zeros(3, 64, 64, dtype=torch.uint8))
        out = torch.empty(1, 3, 224, 224, dtype=torch.float16, device=device)
        for layout in (torch.channels_last, torch.contiguous_format):
            out = out.contiguous(memory_format=layout)
            preprocess_images(decode_batch([jpeg], device), [1], transform, out=out, places=[0])
        torch.cuda.synchronize(device)

    pool = ThreadPoolExecutor(1)
    started = pool.submit(run)
    pool.shutdown(wait=False)
    return started


def decode_batch(data: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Decode JPEGs by nvJPEG: uint8 (3, height, width) on the device each.

    Raises:
        RuntimeError: it refuses one of them.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    with warnings.catch_warnings():
        # torchvision means to drop its decoders one day; until then they are what a plain install brings.
        warnings.simplefilter("ignore")
        return list(decode_jpeg(data, mode=ImageReadMode.RGB, device=device))


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """What became of a batch's encoded images; its GPU memory belongs to `stream`.

    `images`: uint8 (3, height, width) each; image i is number `numbers[i]` of the batch's. `ready`: rows of the
    batch's pixels that hold what goes to the model.
    """

    images: list[torch.Tensor]
    numbers: list[int]
    ready: list[int]
    stream: torch.cuda.Stream


class GpuInput:
    """Makes model input of batches: `decode` in threads beside the model's, then `finish` in its own."""

    THREADS = 2
    """One waits for the decoder while the other has it, so that it is never idle between two batches."""

    def __init__(self, transform: Transform, device: torch.device, dtype: torch.dtype, *, channels_last: bool) -> None:
        self._transform, self._device, self._dtype = transform, device, dtype
        self._channels_last = channels_last
        # Streams of their own: nvJPEG must not overtake work that is queued on the model's.
        self._streams = itertools.cycle([torch.cuda.Stream(device) for _ in range(self.THREADS)])

    @torch.inference_mode()
    def decode(self, batch: Batch, clock: Callable[[str, float], None]) -> Decoded:
        """Decode a batch's encoded images; bad samples that show up are added to its errors."""
        started = time.perf_counter()
        stream = next(self._streams)
        jpegs = batch.jpegs
        if jpegs is None or not jpegs.data:
            ready = list(range(len(batch.pixels if jpegs is None else batch.index)))
            return Decoded(images=[], numbers=[], ready=ready, stream=stream)
        images: list[torch.Tensor] = []
        numbers: list[int] = []
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            for portion in _portions(jpegs.sizes):
                for number, image in zip(portion, self._decode([jpegs.data[i] for i in portion]), strict=True):
                    if image is None:
                        self._decode_on_cpu(batch, jpegs, number)
                    else:
                        images.append(image)
                        numbers.append(number)
        decoded = {jpegs.places[number] for number in numbers}
        clock("gpu decode", time.perf_counter() - started)
        return Decoded(
            images=images,
            numbers=numbers,
            ready=[place for place in range(len(batch.index)) if place not in decoded],
            stream=stream,
        )

    @torch.inference_mode()
    def finish(self, batch: Batch, decoded: Decoded) -> torch.Tensor:
        """Model input (batch_size, 3, height, width), ready once the current stream gets to it."""
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.device(self._device), torch.cuda.stream(decoded.stream):
            images = self._fill(batch, decoded)
        current.wait_stream(decoded.stream)
        images.record_stream(current)
        return images

    def _fill(self, batch: Batch, decoded: Decoded) -> torch.Tensor:
        if batch.jpegs is None:
            return self._normalise(batch.pixels.to(self._device, non_blocking=True))
        from mgpu_ddp.kernels import preprocess_images

        jpegs, shape = batch.jpegs, (len(batch.pixels), 3, *self._transform.out_size)
        layout = torch.channels_last if self._channels_last else torch.contiguous_format
        images = torch.empty(shape, dtype=self._dtype, device=self._device, memory_format=layout).zero_()
        preprocess_images(
            decoded.images,
            [jpegs.orientations[number] for number in decoded.numbers],
            self._transform,
            out=images,
            places=[jpegs.places[number] for number in decoded.numbers],
        )
        if decoded.ready:
            pixels = batch.pixels[decoded.ready].to(self._device)
            images[torch.tensor(decoded.ready, device=self._device)] = self._normalise(pixels)
        return images

    def _normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._transform.normalise(pixels, dtype=self._dtype, channels_last=self._channels_last)

    def _decode(self, data: list[torch.Tensor]) -> list[torch.Tensor | None]:
        """uint8 (3, height, width) on the device each; None for what the decoder refuses."""
        try:
            return list(decode_batch(data, self._device))
        except RuntimeError as error:
            # One refused image fails the call: halve until it stands alone.
            if len(data) == 1:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
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
