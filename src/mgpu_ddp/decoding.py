"""Batches → model input on a GPU, on streams and in threads of their own, while the model runs the batch before.

nvJPEG decodes whole batches, and one kernel makes model input of them. What nvJPEG refuses, Pillow decodes here, as
the loader's workers do with all that is no plain JPEG.
"""

import ctypes
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import torch

from mgpu_ddp.config import Config, Listed, require
from mgpu_ddp.loading import Batch, Integers, Jpegs, reason_of
from mgpu_ddp.nvjpeg import Decoder, Files, Images, JpegError, Planes, library
from mgpu_ddp.preprocess import Transform, decode, imagenet

MAX_DECODED_PIXELS = 1 << 30
"""That are decoded at once, to bound memory: three bytes each."""


def decode_of(config: Config, device: torch.device) -> str:
    """`runtime.decode` with auto decided: gpu where there is one and images come as files. gpu, exact or cpu.

    Raises:
        UsageError: the GPU was asked for in vain.
    """
    may, wanted = device.type == "cuda" and isinstance(config.data, Listed), config.runtime.decode
    rule = "cpu or auto but for image files on a CUDA device, with nvJPEG (torchvision's CUDA wheels bring it)"
    may = may and (wanted == "cpu" or library() is not None)
    require(may or wanted in ("auto", "cpu"), "runtime.decode", rule, wanted, "Leave it out.")
    return ("gpu" if wanted == "auto" else wanted) if may else "cpu"


@functools.cache
def decoder_of(device: torch.device) -> Decoder:
    """The decoder of a device: made once per process, for that takes a while."""
    return Decoder(device)


def warm_up(device: torch.device) -> Future[None]:
    """Start what the first batch would wait for, beside other work: the device, the decoder and the kernel."""

    def run() -> None:
        from mgpu_ddp.kernels import preprocess_images

        decoder_of(device)
        side = np.array([8], dtype=np.int64)
        out = torch.empty(1, 3, 224, 224, dtype=torch.float16, device=device)
        for layout in (torch.channels_last, torch.contiguous_format):
            images, out = Images.empty(side, side, device), out.contiguous(memory_format=layout)
            preprocess_images(images, [1], imagenet(224), out=out, places=[0])
        torch.cuda.synchronize(device)

    pool = ThreadPoolExecutor(1)
    started = pool.submit(run)
    pool.shutdown(wait=False)
    return started


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """Model input that is ready once `made` has happened on its device."""

    images: torch.Tensor
    made: torch.cuda.Event
    files: torch.Tensor | None
    """What the decoder may be reading until then."""

    def on_current_stream(self) -> torch.Tensor:
        """The images (batch_size, 3, height, width) for work that is queued from now on."""
        current = torch.cuda.current_stream(self.images.device)
        current.wait_event(self.made)
        self.images.record_stream(current)
        return self.images


class GpuInput:
    """Makes model input of batches, several at a time, each in a thread of its own and on a stream of its own."""

    THREADS = 3
    """One waits for the decoder, while the others prepare the next batch and finish the last one."""

    def __init__(
        self, transform: Transform, device: torch.device, dtype: torch.dtype, *, channels_last: bool, exact: bool
    ) -> None:
        self._transform, self._device, self._dtype = transform, device, dtype
        self._channels_last, self._exact = channels_last, exact
        self._streams: SimpleQueue[torch.cuda.Stream] = SimpleQueue()
        for _ in range(self.THREADS):
            self._streams.put(torch.cuda.Stream(device))
        rule = "gpu or cpu on a GPU without JPEG engines"
        has_engines = not exact or decoder_of(device).has_engines
        require(has_engines, "runtime.decode", rule, "exact", "Pillow's pixels take engines, or the CPU.")

    @torch.inference_mode()
    def make(self, batch: Batch, clock: Callable[[str, float], None]) -> Ready:
        """Decode what is encoded and preprocess; bad samples that show up are added to the batch's errors."""
        stream = self._streams.get()
        files: torch.Tensor | None = None
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(stream):
                if batch.jpegs is None:
                    images = self._normalise(batch.pixels.to(self._device, non_blocking=True))
                else:
                    files = torch.empty(int(batch.jpegs.lengths.sum()), dtype=torch.uint8, pin_memory=True)
                    images = self._decode_all(batch, batch.jpegs, files, clock)
                made = torch.cuda.Event()
                made.record()
        finally:
            self._streams.put(stream)
        return Ready(images=images, made=made, files=files)

    def _decode_all(
        self, batch: Batch, jpegs: Jpegs, pinned: torch.Tensor, clock: Callable[[str, float], None]
    ) -> torch.Tensor:
        from mgpu_ddp.kernels import preprocess_images

        shape = (len(batch.pixels), 3, *self._transform.out_size)
        layout = torch.channels_last if self._channels_last else torch.contiguous_format
        images = torch.empty(shape, dtype=self._dtype, device=self._device, memory_format=layout).zero_()
        by_pixels = np.ones(len(batch.index), dtype=bool)
        by_pixels[jpegs.places] = False
        files = _copied(jpegs, pinned)
        for portion in _portions(jpegs.heights * jpegs.widths):
            for numbers, decoded in self._decode(jpegs, files, portion, clock):
                places = jpegs.places[numbers]
                if decoded is None:
                    self._decode_on_cpu(batch, jpegs, int(numbers[0]))
                    by_pixels[places] = True
                else:
                    orientations = jpegs.orientations[numbers]
                    preprocess_images(decoded, orientations, self._transform, out=images, places=places)
        rows = torch.from_numpy(np.flatnonzero(by_pixels))
        if len(rows):
            images[rows.to(self._device)] = self._normalise(batch.pixels[rows].to(self._device))
        return images

    def _normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._transform.normalise(pixels, dtype=self._dtype, channels_last=self._channels_last)

    def _decode(
        self, jpegs: Jpegs, files: Files, numbers: Integers, clock: Callable[[str, float], None]
    ) -> Iterator[tuple[Integers, Images | None]]:
        """Decode images, with these numbers, in as few calls as the decoder lets: None for one that it refuses."""
        stream = torch.cuda.current_stream(self._device)
        sizes = jpegs.heights[numbers], jpegs.widths[numbers]
        into: Images | Planes = Images.empty(*sizes, self._device)
        if self._exact:
            into = Planes.empty(*sizes, jpegs.across[numbers], jpegs.down[numbers], self._device)
        # What memory this was before, kernels on this stream may still be reading.
        stream.synchronize()
        try:
            clock("gpu decode", decoder_of(self._device).decode(files[numbers], into, stream))
        except JpegError:
            # One refused image fails the call: halve until it stands alone.
            if len(numbers) == 1:
                yield numbers, None
            else:
                for half in np.array_split(numbers, 2):
                    yield from self._decode(jpegs, files, half, clock)
        else:
            yield numbers, _as_rgb(into)

    def _decode_on_cpu(self, batch: Batch, jpegs: Jpegs, number: int) -> None:
        place = int(jpegs.places[number])
        batch.pixels[place] = 0
        try:
            pixels = self._transform.geometry(decode(jpegs.content(number)))
            batch.pixels[place] = torch.from_numpy(np.ascontiguousarray(pixels))
        except Exception as error:  # decoders raise all kinds; each bad image is one row
            batch.errors[int(batch.index[place])] = reason_of(error)


def _as_rgb(decoded: Images | Planes) -> Images:
    if isinstance(decoded, Images):
        return decoded
    from mgpu_ddp.colours import to_rgb

    return to_rgb(decoded)


def _copied(jpegs: Jpegs, pinned: torch.Tensor) -> Files:
    """The files in pinned memory, where the decoder need not copy them while it keeps others waiting."""
    first, ends = pinned.data_ptr(), np.cumsum(jpegs.lengths)
    addresses = first + ends - jpegs.lengths
    if len(jpegs) and not jpegs.spilt:
        ctypes.memmove(first, int(jpegs.addresses[0]), len(pinned))
    else:
        for to, source, length in zip(
            addresses.tolist(), jpegs.addresses.tolist(), jpegs.lengths.tolist(), strict=True
        ):
            ctypes.memmove(to, source, length)
    return Files(addresses=addresses, lengths=jpegs.lengths)


def _portions(sizes: Integers) -> list[Integers]:
    """Numbers of images in runs that together stay within `MAX_DECODED_PIXELS`, or hold one image."""
    cuts, left = [], MAX_DECODED_PIXELS
    for number, size in enumerate(sizes.tolist()):
        if size > left and number > 0:
            cuts.append(number)
            left = MAX_DECODED_PIXELS
        left -= size
    return [portion for portion in np.split(np.arange(len(sizes)), cuts) if len(portion)]
