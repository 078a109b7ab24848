"""Batches → model input on a GPU, in threads and on streams of their own, while the model runs the batch before.

nvJPEG decodes whole batches, and one kernel makes model input of them. What nvJPEG refuses, Pillow decodes here; what
is no plain JPEG, the loader's workers have decoded already.
"""

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from PIL import Image

from mgpu_ddp.config.checks import require
from mgpu_ddp.config.schema import Config, Listed
from mgpu_ddp.data.script_dataset import ScriptDataset
from mgpu_ddp.errors import HangError, OutOfMemoryError
from mgpu_ddp.loader.batch import Batch
from mgpu_ddp.loader.jpegs import Jpegs
from mgpu_ddp.loader.worker import row_error
from mgpu_ddp.preprocess.nvjpeg import Decoder, Files, Images, JpegError, Planes, library
from mgpu_ddp.preprocess.transform import AnyTransform, Integers, Pixels, TensorInput, Transform, decode, imagenet

MAX_DECODED_PIXELS = 1 << 29
"""Pixels that one thread decodes at once, three bytes each, to bound memory."""
GROUP = 256
"""Images that are decoded at once where batches are smaller: the engines would idle between the calls."""
HANGS_S = 120
"""A batch takes the decoder milliseconds; one that takes this long never ends."""
LOOK_S = 5.0
"""Between two checks of a batch that is late."""
COPIED_BYTES = 256 << 20
"""Bytes that raw images of a batch take on the GPU at once."""
ALIGNMENT = 512
"""Bytes that the memory of a tensor of its own is aligned to."""


def decode_of(
    config: Config, device: torch.device, dataset: ScriptDataset | None = None, own: AnyTransform | None = None
) -> str:
    """`runtime.decode` with auto decided: gpu where there is one and images come as files. gpu, exact or cpu.

    `dataset` and `own`, a transform, are the script's.

    Raises:
        UsageError: the GPU was asked for, and cannot decode.
    """
    wanted, lacks = config.runtime.decode, ""
    if device.type != "cuda":
        lacks = "where there is no CUDA device"
    elif not (isinstance(config.data, Listed) or (dataset is not None and dataset.kind.image == "encoded")):
        lacks = "where images do not come as files"
    elif isinstance(own, TensorInput):
        lacks = "where the script's transform takes a PIL image"
    elif wanted != "cpu" and library() is None:
        lacks = "without nvJPEG, which torchvision's CUDA wheels bring"
    require(not lacks or wanted in ("auto", "cpu"), "runtime.decode", f"cpu or auto {lacks}", wanted, "Leave it out.")
    return "cpu" if lacks else "gpu" if wanted == "auto" else wanted


def group_of(batch_size: int) -> int:
    """How many batches are decoded at once."""
    return max(1, GROUP // batch_size)


@functools.cache
def decoder_of(device: torch.device) -> Decoder:
    """The decoder of a device, made once per process because that takes a while."""
    return Decoder(device)


def warm_up(device: torch.device, *, decodes: bool) -> Future[None]:
    """Start what the first batch would wait for, in the background: the device, the decoder and the kernel."""

    def run() -> None:
        from mgpu_ddp.preprocess.resize_kernel import preprocess_images

        if decodes:
            decoder_of(device)
        side = np.array([8], dtype=np.int64)
        # A new thread starts on the first device, where pinning would make a context for each rank of the host.
        with torch.cuda.device(device):
            out = torch.empty(1, 3, 224, 224, dtype=torch.float16, device=device)
            for layout in (torch.channels_last, torch.contiguous_format):
                images, out = Images.empty(side, side, device), out.contiguous(memory_format=layout)
                preprocess_images(images, [1], imagenet(224), out=out, rows=[0])
            torch.cuda.synchronize()

    pool = ThreadPoolExecutor(1)
    started = pool.submit(run)
    pool.shutdown(wait=False)
    return started


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """Model input that is ready once `made` has happened on its device."""

    images: torch.Tensor
    made: torch.cuda.Event
    decode_s: float
    """Seconds inside nvJPEG's calls. The first of the batches that were decoded together has them all."""

    def on_current_stream(self) -> torch.Tensor:
        """The images (batch_size, 3, height, width) for work that is queued from now on."""
        current = torch.cuda.current_stream(self.images.device)
        current.wait_event(self.made)
        self.images.record_stream(current)
        return self.images


class BatchGroup:
    """Batches that are decoded together, and whose rows lie one batch after the other in one tensor.

    Knows which batch a row of the group belongs to, and whether it is made of the batch's pixels or of a JPEG.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches, self._batch_size = batches, len(batches[0].pixels)
        self.jpegs = Jpegs.joined([batch.jpegs for batch in batches if batch.jpegs is not None], self._batch_size)
        """Those of all batches; their `rows` are the group's."""
        num_samples = np.array([len(batch.index) for batch in batches])
        # (batches, batch_size). Rows past a batch's samples are made of nothing.
        self._of_pixels = np.arange(self._batch_size) < num_samples[:, None]
        self._of_pixels[divmod(self.jpegs.rows, self._batch_size)] = False

    def __len__(self) -> int:
        """Rows of all batches together."""
        return self._of_pixels.size

    def decode_on_cpu(self, number: int, geometry: Callable[[Image.Image], Pixels]) -> None:
        """Decode a JPEG, by its number, into its batch's pixels; record the error if Pillow refuses it as well."""
        owner, row = divmod(int(self.jpegs.rows[number]), self._batch_size)
        batch = self._batches[owner]
        batch.pixels[row] = 0
        self._of_pixels[owner, row] = True
        try:
            batch.pixels[row].numpy()[:] = geometry(decode(self.jpegs.content(number)))
        except Exception as error:  # decoders raise all kinds; each bad image is one row
            batch.errors[int(batch.index[row])] = row_error(error)

    def pixels(self) -> Iterator[tuple[Integers, torch.Tensor]]:
        """Yield, for each batch, the group's rows that are made of pixels, and these pixels."""
        for owner, (batch, chosen) in enumerate(zip(self._batches, self._of_pixels, strict=True)):
            rows = np.flatnonzero(chosen)
            if len(rows):
                yield owner * self._batch_size + rows, batch.pixels[torch.from_numpy(rows)]

    def split(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Split a tensor of all rows into one per batch."""
        # A convolution's kernel, and with it the last bits, may depend on how its input is aligned.
        parts = images.split(self._batch_size)
        return [part if part.data_ptr() % ALIGNMENT == 0 else part.clone() for part in parts]


class GpuInput:
    """Makes model input of batches, several at a time, each in its own thread and on its own stream."""

    THREADS = 2 * Decoder.LANES + 1
    """One waits for each of the decoder's lanes, while others prepare the next batches and finish the last ones."""

    def __init__(
        self, transform: AnyTransform, device: torch.device, dtype: torch.dtype, *, channels_last: bool, exact: bool
    ) -> None:
        self._all, self._device, self._dtype = transform, device, dtype
        self._channels_last, self._exact = channels_last, exact
        if isinstance(transform, Transform):
            self._transform = transform
            self._finish = transform.without_geometry(transform.out_size)
            """The last step for pixels that a loader's worker has resized: normalising."""
        self._streams: SimpleQueue[torch.cuda.Stream] = SimpleQueue()
        for _ in range(self.THREADS):
            self._streams.put(torch.cuda.Stream(device))
        rule = "gpu or cpu on a GPU without JPEG engines"
        is_possible = not exact or decoder_of(device).has_engines
        require(is_possible, "runtime.decode", rule, "exact", "Use runtime.decode=cpu for Pillow's pixels.")

    def check(self) -> None:
        """Raise HangError if the decoder hangs."""
        if decoder_of.cache_info().currsize and decoder_of(self._device).longest_s > HANGS_S:
            raise HangError(
                f"nvJPEG hangs: it has not decoded a batch for {HANGS_S} s. Start again, which resumes; if it hangs"
                " again, set runtime.decode=cpu."
            )

    @torch.inference_mode()
    def make(self, batches: Sequence[Batch]) -> list[Ready]:
        """Decode what is encoded, and preprocess; adds bad samples that show up to their batch's errors."""
        stream, decode_s = self._streams.get(), [0.0] * len(batches)

        def clock(spent_s: float) -> None:
            decode_s[0] += spent_s

        try:
            with torch.cuda.device(self._device), torch.cuda.stream(stream):
                if batches[0].jpegs is not None:
                    images = self._decode_group(BatchGroup(batches), clock)
                else:
                    images = [self._preprocess(batch) for batch in batches]
                made = torch.cuda.Event()
                made.record()
        finally:
            self._streams.put(stream)
        return [Ready(images=each, made=made, decode_s=spent_s) for each, spent_s in zip(images, decode_s, strict=True)]

    def _empty(self, rows: int) -> torch.Tensor:
        layout = torch.channels_last if self._channels_last else torch.contiguous_format
        shape = (rows, 3, *self._transform.out_size)
        return torch.empty(shape, dtype=self._dtype, device=self._device, memory_format=layout)

    def _preprocess(self, batch: Batch) -> torch.Tensor:
        if isinstance(self._all, TensorInput):
            tensors = batch.pixels.to(self._device, non_blocking=True)
            return self._all.normalise(tensors, dtype=self._dtype, channels_last=self._channels_last)
        out = self._empty(len(batch.pixels))
        self._fill(out, batch.pixels, np.arange(len(out)), self._transform if batch.raw else self._finish)
        return out

    def _fill(self, out: torch.Tensor, pixels: torch.Tensor, rows: Integers, transform: Transform) -> None:
        """Turn pixels of the host into these rows of model input."""
        from mgpu_ddp.preprocess.resize_kernel import preprocess_images

        step = max(1, COPIED_BYTES // pixels[0].numel())
        for part, where in zip(pixels.split(step), np.split(rows, range(step, len(rows), step)), strict=True):
            images = Images.of(part.to(self._device, non_blocking=True))
            preprocess_images(images, np.ones_like(where), transform, out=out, rows=where)

    def _decode_group(self, group: BatchGroup, clock: Callable[[float], None]) -> list[torch.Tensor]:
        from mgpu_ddp.preprocess.resize_kernel import preprocess_images

        jpegs, images = group.jpegs, self._empty(len(group)).zero_()
        # Pinned, so that the decoder need not copy them while it keeps others waiting.
        pinned = torch.empty(int(jpegs.lengths.sum()), dtype=torch.uint8, pin_memory=True)
        files = copied(jpegs, pinned)
        for portion in _portions(jpegs.heights * jpegs.widths):
            for numbers, decoded in self._decode(jpegs, files, portion, clock):
                if decoded is None:
                    group.decode_on_cpu(int(numbers[0]), self._transform.geometry)
                else:
                    turned, rows = jpegs.orientations[numbers], jpegs.rows[numbers]
                    preprocess_images(decoded, turned, self._transform, out=images, rows=rows)
        for rows, pixels in group.pixels():
            self._fill(images, pixels, rows, self._finish)
        return group.split(images)

    def _decode(
        self, jpegs: Jpegs, files: Files, numbers: Integers, clock: Callable[[float], None]
    ) -> Iterator[tuple[Integers, Images | None]]:
        """Decode images, by their numbers, in as few calls as possible; yields None for one that is refused."""
        sizes = jpegs.heights[numbers], jpegs.widths[numbers]
        into: Images | Planes = Images.empty(*sizes, self._device)
        if self._exact:
            into = Planes.empty(*sizes, jpegs.across[numbers], jpegs.down[numbers], self._device)
        # Kernels on this stream may still be reading from this memory as it was before.
        torch.cuda.current_stream(self._device).synchronize()
        try:
            clock(decoder_of(self._device).decode(files[numbers], into))
        except JpegError:
            # One refused image fails the call: halve until it is alone.
            if len(numbers) == 1:
                yield numbers, None
            else:
                for half in np.array_split(numbers, 2):
                    yield from self._decode(jpegs, files, half, clock)
        else:
            yield numbers, _as_rgb(into)


def _as_rgb(decoded: Images | Planes) -> Images:
    if isinstance(decoded, Images):
        return decoded
    from mgpu_ddp.preprocess.ycbcr_kernel import to_rgb

    return to_rgb(decoded)


def copied(jpegs: Jpegs, into: torch.Tensor) -> Files:
    """Copy files one after the other; those that already lie in a row are copied at once."""
    ends = np.cumsum(jpegs.lengths)
    addresses = into.data_ptr() + ends - jpegs.lengths
    breaks = np.flatnonzero(np.diff(jpegs.addresses - addresses)) + 1
    for run in np.split(np.arange(len(jpegs)), breaks):
        if len(run):
            ctypes.memmove(int(addresses[run[0]]), int(jpegs.addresses[run[0]]), int(jpegs.lengths[run].sum()))
    return Files(addresses=addresses, lengths=jpegs.lengths)


def _portions(sizes: Integers) -> list[Integers]:
    """Split the numbers of images of these sizes, in pixels, into runs within `MAX_DECODED_PIXELS`, or of one image."""
    cuts, left = [], MAX_DECODED_PIXELS
    for number, size in enumerate(sizes.tolist()):
        if size > left and number > 0:
            cuts.append(number)
            left = MAX_DECODED_PIXELS
        left -= size
    return [portion for portion in np.split(np.arange(len(sizes)), cuts) if len(portion)]


class Staging:
    """Feeds batches to a `GpuInput`: encoded ones in threads, small ones of them in groups."""

    def __init__(self, inputs: GpuInput) -> None:
        self._inputs = inputs
        self._threads = ThreadPoolExecutor(inputs.THREADS)
        self._begun: set[Future[None]] = set()
        """Groups that threads may still be at work on."""
        self._looks = 0
        """How often what is waited for was not there yet."""
        self._group: list[tuple[Batch, Future[Ready]]] = []

    def submit(self, batch: Batch) -> Future[Ready]:
        """Take a batch, and begin with it once its group is full, or at `flush`."""
        future: Future[Ready] = Future()
        self._group.append((batch, future))
        if batch.jpegs is None:
            # There is nothing to wait for: another thread would only cost time.
            self._make(self._taken())
        elif len(self._group) == group_of(len(batch.pixels)):
            self.flush()
        return future

    def wait(self, future: Future[Ready]) -> Ready:
        """Wait until a batch's input is made.

        Raises:
            HangError: it never will be, because the decoder hangs.
            OutOfMemoryError: there is no room for it on the GPU.
        """
        self._await({future})
        return future.result()

    def _await(self, futures: set[Future[Any]]) -> None:
        while wait(futures, timeout=LOOK_S).not_done:
            self._looks += 1
            # Looks are counted and not time, which goes on while a process is stopped.
            if self._looks * LOOK_S >= HANGS_S:
                self._inputs.check()
        self._looks = 0

    def flush(self) -> None:
        """Begin with a group that is not full, because no more batches come."""
        if self._group:
            self._begun = {future for future in self._begun if not future.done()}
            self._begun.add(self._threads.submit(self._make, self._taken()))

    def _taken(self) -> list[tuple[Batch, Future[Ready]]]:
        group, self._group = self._group, []
        return group

    def _make(self, group: list[tuple[Batch, Future[Ready]]]) -> None:
        try:
            made = self._inputs.make([batch for batch, _ in group])
        except torch.OutOfMemoryError as error:
            for batch, future in group:
                future.set_exception(OutOfMemoryError.of("batch_size", len(batch.pixels), error))
        except BaseException as error:
            for _, future in group:
                future.set_exception(error)
        else:
            for (_, future), ready in zip(group, made, strict=True):
                future.set_result(ready)

    def close(self) -> None:
        """Wait for the groups that were begun, and begin with no other.

        Raises:
            HangError: one never ends, because the decoder hangs.
        """
        self._threads.shutdown(wait=False, cancel_futures=True)
        # `wait` does not count cancelled futures as done.
        self._await({future for future in self._begun if not future.done()})
