"""Batches → model input on a GPU, in threads and on streams of their own, while the model runs the batch before.

nvJPEG decodes whole portions of images, and one kernel makes model input of each. What nvJPEG refuses, Pillow decodes
here; what is no plain JPEG, the loader's workers have decoded already.

A batch here is what is loaded as one: small batches together, or a large one, which is made of many portions, so that
the memory of what is decoded at once is bounded.
"""

import ctypes
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import torch
from PIL import Image

from mgpu_ddp.config.checks import require
from mgpu_ddp.config.resolved import TOGETHER, Resolved, is_on_gpu
from mgpu_ddp.config.schema import Config, Listed
from mgpu_ddp.data.script_dataset import ScriptDataset
from mgpu_ddp.errors import HangError, OutOfMemoryError
from mgpu_ddp.loader.batch import Batch
from mgpu_ddp.loader.jpegs import Jpegs
from mgpu_ddp.loader.loader import PIECE_PIXELS, piece_rows
from mgpu_ddp.loader.worker import row_error
from mgpu_ddp.preprocess.nvjpeg import Decoder, Files, Images, JpegError, Planes, library, library_version
from mgpu_ddp.preprocess.transform import AnyTransform, Integers, Pixels, TensorInput, Transform, decode, imagenet

log = logging.getLogger("mgpu_ddp")

MAX_DECODED_PIXELS = PIECE_PIXELS
"""Pixels that one thread decodes at once, three bytes each, to bound memory."""
PIECES = 3
"""Pieces of a portion, where batches are not so small that `TOGETHER` images are more."""
PORTIONS = 6
"""Portions that are begun and not done: a few for the decoder, and what is copied and resized meanwhile."""
LARGE_PORTIONS = 4
"""As many of them where they are as large as may be."""
HANGS_S = 120
"""A batch takes the decoder milliseconds; one that takes this long never ends."""
LOOK_S = 5.0
"""Between two checks of a batch that is late."""
STAGED = 4
"""Batches whose input is made while the model runs the one before."""
STAGED_BYTES = 512 << 20
"""Model input of these, where that of one is not more."""
COPIED_BYTES = 256 << 20
"""Bytes that raw images of a batch take on the GPU at once."""


def decode_of(
    config: Config, device: torch.device, dataset: ScriptDataset | None = None, own: AnyTransform | None = None
) -> str:
    """`runtime.decode` with auto decided: gpu where there is one and images come as files.

    `dataset` and `own`, a transform, are the script's.

    Raises:
        UsageError: the GPU was asked for, and cannot decode.
    """
    wanted, lacks = config.runtime.decode, ""
    if config.boxes and wanted == "scaled":
        lacks = "where samples are boxes, which are counted in pixels of the whole image"
    elif device.type != "cuda" and wanted != "scaled":
        lacks = "where there is no CUDA device"
    elif not (isinstance(config.data, Listed) or (dataset is not None and dataset.kind.image == "encoded")):
        lacks = "where images do not come as files"
    elif isinstance(own, TensorInput):
        lacks = "where the script's transform takes a PIL image"
    elif wanted not in ("cpu", "scaled") and library() is None:
        suffix = "-cu12" if str(torch.version.cuda).startswith("12.") else ""
        remedy = f"pip install nvidia-nvjpeg{suffix}"
        rule = "cpu or auto without nvJPEG, which torchvision's CUDA wheels bring"
        require(wanted == "auto", "runtime.decode", rule, wanted, f"Install it ({remedy}), or leave the key out.")
        log.warning("JPEGs are decoded on CPUs, many times as slowly as on the GPU: nvJPEG is missing. %s", remedy)
        return "cpu"
    require(not lacks or wanted in ("auto", "cpu"), "runtime.decode", f"cpu or auto {lacks}", wanted, "Leave it out.")
    decode = "cpu" if lacks else "gpu" if wanted == "auto" else wanted
    if is_on_gpu(decode):
        log.info("JPEGs are decoded by nvJPEG %s, %s", library_version(), getattr(library(), "_name", None))
    return decode


def pieces_of(rows: int) -> int:
    """The most pieces of a portion, of so many samples at most."""
    return max(PIECES, TOGETHER // rows)


def held_pieces(resolved: Resolved) -> int:
    """How many of the loader's pieces `Staging` may hold at once."""
    return pieces_of(piece_rows(resolved)) * (PORTIONS + 1)


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
    """Model input that is ready once all of `made` have happened on its device."""

    images: torch.Tensor
    made: Sequence[torch.cuda.Event]

    def on_current_stream(self) -> torch.Tensor:
        """The images (rows, 3, height, width) for work that is queued from now on."""
        current = torch.cuda.current_stream(self.images.device)
        for event in self.made:
            current.wait_event(event)
        self.images.record_stream(current)
        return self.images


@dataclass(frozen=True, kw_only=True, slots=True)
class Zeros:
    """Memory for a batch's model input: `zeroed` happens on the device when all is zero, padding among it."""

    images: torch.Tensor
    zeroed: torch.cuda.Event


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """The end of a portion's work: `made` happens on the device when its rows are there."""

    made: torch.cuda.Event
    decode_s: float
    """Seconds inside nvJPEG's calls."""


class Portion:
    """Pieces of batches that are decoded together.

    Knows which piece a row of the batch belongs to, and whether it is made of the piece's pixels or of a JPEG. Several
    rows may be made of one JPEG.
    """

    def __init__(self, pieces: Sequence[Batch], first_rows: Sequence[int]) -> None:
        """`first_rows` are those of the pieces in their batch."""
        self._pieces, self._first_rows = pieces, first_rows
        jpegs = [piece.jpegs for piece in pieces if piece.jpegs is not None]
        self.jpegs = Jpegs.joined(jpegs, first_rows)
        """The samples of all pieces; their `rows` are the batch's."""
        self.images = self.jpegs[self.jpegs.firsts]
        """Each of their images once."""
        self._owners = np.repeat(np.arange(len(jpegs)), [len(each) for each in jpegs])
        self._of_pixels = [np.ones(len(piece.index), dtype=bool) for piece in pieces]
        for of_pixels, each in zip(self._of_pixels, jpegs, strict=True):
            of_pixels[each.rows] = False

    def decode_on_cpu(self, number: int, geometry: Callable[[Image.Image], Pixels]) -> None:
        """Decode a sample, by its number, into its piece's pixels; record the error if Pillow refuses it as well."""
        owner = int(self._owners[number])
        piece, row = self._pieces[owner], int(self.jpegs.rows[number]) - self._first_rows[owner]
        piece.pixels[row] = 0
        self._of_pixels[owner][row] = True
        try:
            window = tuple(self.jpegs.windows[number].tolist())
            piece.pixels[row].numpy()[:] = geometry(decode(self.jpegs.content(number)).crop(window))
        except Exception as error:  # decoders raise all kinds; each bad image is one row
            piece.errors[int(piece.index[row])] = row_error(error)

    def pixels(self) -> Iterator[tuple[Integers, torch.Tensor]]:
        """Yield, for each piece, the batch's rows that are made of pixels, and these pixels."""
        for piece, first_row, chosen in zip(self._pieces, self._first_rows, self._of_pixels, strict=True):
            rows = np.flatnonzero(chosen)
            if len(rows):
                yield first_row + rows, piece.pixels[torch.from_numpy(rows)]


class Contenders:
    """Portions at work, which contend for the GPU's memory."""

    def __init__(self) -> None:
        self._ending = threading.Condition()
        self._num_at_work = self._num_ended = 0
        self.num_left = 0
        """How often one has ended, or has begun to wait."""

    @contextmanager
    def working(self) -> Iterator[None]:
        with self._ending:
            self._num_at_work += 1
        try:
            yield
        finally:
            with self._ending:
                self._num_at_work -= 1
                self._num_ended += 1
                self.num_left += 1
                self._ending.notify_all()

    def wait(self, num_left: int) -> bool:
        """Wait, holding nothing, until another one has ended; not if one has left since `num_left` was read.

        False if this is the only one at work: there is nothing to wait for.
        """
        with self._ending:
            if self.num_left != num_left:
                return True
            if self._num_at_work == 1:
                return False
            self._num_at_work -= 1
            self.num_left += 1
            before = self._num_ended
            self._ending.wait_for(lambda: self._num_ended != before)
            self._num_at_work += 1
        return True


class GpuInput:
    """Makes model input of portions, several at a time, each in its own thread and on its own stream."""

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
        self._zeroing = torch.cuda.Stream(device)
        self._contenders = Contenders()
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
    def make(self, batch: Batch) -> Ready:
        """Preprocess a batch of which nothing is encoded."""
        stream = self._streams.get()
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(stream):
                images, made = self._preprocess(batch), torch.cuda.Event()
                made.record()
        finally:
            self._streams.put(stream)
        return Ready(images=images, made=[made])

    @torch.inference_mode()
    def zeros(self, rows: int) -> Zeros:
        """Memory for the model input of so many rows."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._zeroing):
            images, zeroed = self._empty(rows).zero_(), torch.cuda.Event()
            zeroed.record()
        return Zeros(images=images, zeroed=zeroed)

    @torch.inference_mode()
    def decode(self, portion: Portion, into: Zeros) -> Decoded:
        """Decode what is encoded, and preprocess; adds bad samples that show up to their piece's errors."""
        stream, spent_s = self._streams.get(), list[float]()
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(stream), self._contenders.working():
                stream.wait_event(into.zeroed)
                self._decode_portion(portion, into.images, spent_s.append)
                made = torch.cuda.Event()
                made.record()
        finally:
            self._streams.put(stream)
        return Decoded(made=made, decode_s=sum(spent_s))

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

    def _decode_portion(self, portion: Portion, images: torch.Tensor, clock: Callable[[float], None]) -> None:
        encoded = portion.images
        # Pinned, so that the decoder need not copy them while it keeps others waiting.
        pinned = torch.empty(int(encoded.lengths.sum()), dtype=torch.uint8, pin_memory=True)
        files = copied(encoded, pinned)
        for run in _runs(encoded.heights * encoded.widths):
            self._decode_run(portion, files, run, images, clock)
        for rows, pixels in portion.pixels():
            self._with_room(functools.partial(self._fill, images, pixels, rows, self._finish))

    def _decode_run(
        self, portion: Portion, files: Files, numbers: Integers, images: torch.Tensor, clock: Callable[[float], None]
    ) -> None:
        """Turn JPEGs, by their numbers, into their rows of model input, in as few calls as possible.

        Raises:
            torch.OutOfMemoryError: there is no room for a single image.
        """
        from mgpu_ddp.preprocess.resize_kernel import preprocess_images

        samples, places = portion.jpegs.of_images(numbers)
        mine = portion.jpegs[samples]

        def run() -> None:
            decoded = self._decoded(portion.images, files, numbers, clock)[places]
            turned, rows, windows = mine.orientations, mine.rows, mine.windows
            preprocess_images(decoded, turned, self._transform, out=images, rows=rows, windows=windows)

        try:
            self._with_room(run)
        except torch.OutOfMemoryError:
            if len(numbers) == 1:
                raise
        except JpegError:
            if len(numbers) == 1:
                for sample in samples.tolist():
                    portion.decode_on_cpu(sample, self._transform.geometry)
                return
        else:
            return
        # One refused image fails the call, and too many for the memory do so as well: halve.
        for half in np.array_split(numbers, 2):
            self._decode_run(portion, files, half, images, clock)

    def _with_room(self, work: Callable[[], None]) -> None:
        """Do work that needs memory of the GPU; where there is none, again once other portions have left theirs.

        Raises:
            torch.OutOfMemoryError: there is none although no other portion is at work.
        """
        while True:
            num_left = self._contenders.num_left
            try:
                return work()
            except torch.OutOfMemoryError as error:
                # Its traceback would keep what is decoded.
                lack = error.with_traceback(None)
            # What torch keeps for later is missing to nvJPEG.
            torch.cuda.empty_cache()
            if not self._contenders.wait(num_left):
                raise lack

    def _decoded(self, jpegs: Jpegs, files: Files, numbers: Integers, clock: Callable[[float], None]) -> Images:
        sizes = jpegs.heights[numbers], jpegs.widths[numbers]
        into: Images | Planes = Images.empty(*sizes, self._device)
        if self._exact:
            into = Planes.empty(*sizes, jpegs.across[numbers], jpegs.down[numbers], self._device)
        # Kernels on this stream may still be reading from this memory as it was before.
        torch.cuda.current_stream(self._device).synchronize()
        clock(decoder_of(self._device).decode(files[numbers], into))
        return _as_rgb(into)


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


def _runs(sizes: Integers) -> list[Integers]:
    """Split the numbers of images of these sizes, in pixels, into runs within `MAX_DECODED_PIXELS`, or of one image."""
    cuts, left = [], MAX_DECODED_PIXELS
    for number, size in enumerate(sizes.tolist()):
        if size > left and number > 0:
            cuts.append(number)
            left = MAX_DECODED_PIXELS
        left -= size
    return [run for run in np.split(np.arange(len(sizes)), cuts) if len(run)]


class Staged:
    """A batch whose model input is being made."""

    def __init__(self) -> None:
        self.pieces: list[Batch] = []
        self.num_rows = 0
        """Samples of its pieces."""
        self.begun: list[Future[Decoded]] = []
        """Portions of its pieces; of all of them once it is whole."""
        self.ready: Ready | None = None
        """Input that was made at once, because nothing of the batch is encoded."""
        self.into: Zeros | None = None
        """Where its portions go."""

    @property
    def batch(self) -> Batch:
        """All its samples, with the errors found while its input was made."""
        return Batch.joined(self.pieces)

    def is_done(self) -> bool:
        """Its portions are decoded, or cannot be."""
        return bool(self.begun) and all(future.done() for future in self.begun)


class Staging:
    """Feeds pieces of batches to a `GpuInput`: encoded ones in portions, in threads."""

    def __init__(self, inputs: GpuInput) -> None:
        self._inputs = inputs
        self._threads = ThreadPoolExecutor(inputs.THREADS)
        self._begun: list[Future[Decoded]] = []
        """Portions that threads may still be at work on, the oldest first."""
        self._pixels: list[int] = []
        """Pixels of the JPEGs of each of these."""
        self._looks = 0
        """How often what is waited for was not there yet."""
        self._staged = Staged()
        self._waiting: list[tuple[Batch, int]] = []
        """Pieces of the next portion, with their first rows in the batch."""
        self._num_waiting = self._pixels_waiting = 0
        """Their samples, and the pixels of their JPEGs."""
        self.most_staged = STAGED
        """Batches whose input may be made ahead of the model."""
        self._decode_s = 0.0

    def submit(self, piece: Batch) -> Staged | None:
        """Take the next piece; returns its batch with the last one. Waits while enough portions are begun.

        Raises:
            HangError: the decoder hangs.
            OutOfMemoryError: there is no room for a batch on the GPU.
        """
        staged = self._staged
        staged.pieces.append(piece)
        if piece.jpegs is None:
            # There is nothing to wait for: another thread would only cost time.
            with _told(piece):
                staged.ready = self._inputs.make(piece)
        else:
            self._place(piece, staged)
        if not piece.is_last:
            return None
        self._staged = Staged()
        return staged

    def _place(self, piece: Batch, staged: Staged) -> None:
        """Put a piece into its batch and the next portion; begin with what is full."""
        if staged.into is None:
            staged.into = self._zeros(piece)
            self.most_staged = max(1, min(STAGED, STAGED_BYTES // staged.into.images.nbytes))
        self._waiting.append((piece, staged.num_rows))
        staged.num_rows += len(piece.index)
        pixels = _pixels(piece)
        self._num_waiting += len(piece.index)
        self._pixels_waiting += pixels
        if (
            piece.is_last
            or self._num_waiting >= TOGETHER
            # Another piece like this one would be more than is decoded at once.
            or self._pixels_waiting + pixels > MAX_DECODED_PIXELS
            or len(self._waiting) >= pieces_of(len(piece.pixels))
        ):
            self._begin(staged, staged.into)

    def _zeros(self, piece: Batch) -> Zeros:
        try:
            return self._inputs.zeros(piece.rows)
        except torch.OutOfMemoryError:
            # The portions at work need theirs for a while only.
            self._await(self._begun)
        with _told(piece):
            return self._inputs.zeros(piece.rows)

    def _begin(self, staged: Staged, into: Zeros) -> None:
        """Begin with the next portion, once there is room for it."""
        self._retire()
        room = LARGE_PORTIONS * MAX_DECODED_PIXELS - self._pixels_waiting
        while len(self._begun) >= PORTIONS or (self._begun and sum(self._pixels) > room):
            self._await(self._begun[:1])
            self._retire()
        pieces, first_rows = zip(*self._waiting, strict=True)
        future = self._threads.submit(self._inputs.decode, Portion(pieces, first_rows), into)
        self._begun.append(future)
        self._pixels.append(self._pixels_waiting)
        staged.begun.append(future)
        self._waiting, self._num_waiting, self._pixels_waiting = [], 0, 0

    def wait(self, staged: Staged) -> Ready:
        """Wait until a batch's input is made.

        Raises:
            HangError: it never will be, because the decoder hangs.
            OutOfMemoryError: there is no room for it on the GPU.
        """
        if staged.ready is not None:
            return staged.ready
        if not staged.is_done():
            self._await(staged.begun)
        assert staged.into is not None
        with _told(staged.pieces[0]):
            return Ready(images=staged.into.images, made=[future.result().made for future in staged.begun])

    def take_decode_s(self) -> float:
        """Seconds inside nvJPEG's calls, of the portions that are done and were not counted yet."""
        self._retire()
        spent_s, self._decode_s = self._decode_s, 0.0
        return spent_s

    def _retire(self) -> None:
        while self._begun and self._begun[0].done():
            future, _ = self._begun.pop(0), self._pixels.pop(0)
            if future.exception() is None:
                self._decode_s += future.result().decode_s

    def _await(self, futures: Sequence[Future[Decoded]]) -> None:
        while wait(futures, timeout=LOOK_S).not_done:
            self._looks += 1
            # Looks are counted and not time, which goes on while a process is stopped.
            if self._looks * LOOK_S >= HANGS_S:
                self._inputs.check()
        self._looks = 0

    def close(self) -> None:
        """Wait for the portions that were begun, and begin with no other.

        Raises:
            HangError: one never ends, because the decoder hangs.
        """
        self._threads.shutdown(wait=False, cancel_futures=True)
        # `wait` does not count cancelled futures as done.
        self._await([future for future in self._begun if not future.done()])


def _pixels(piece: Batch) -> int:
    """Pixels of all JPEGs of a piece together."""
    return 0 if piece.jpegs is None else piece.jpegs.pixels


@contextmanager
def _told(piece: Batch) -> Iterator[None]:
    """Name the batch size where the GPU has no memory left.

    Raises:
        OutOfMemoryError: it has none.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError.of("batch_size", piece.batch_size, error) from None
