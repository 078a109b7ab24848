"""Loader workers → batches: padded, in order, with bad samples kept apart."""

import fcntl
import functools
import logging
import multiprocessing
import os
import pickle
import signal
import struct
import termios
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from mgpu_ddp.config.schema import ArrayConfig, Config, FakeConfig, LoaderConfig, ModelConfig, TransformConfig
from mgpu_ddp.data.fake import FakeSamples
from mgpu_ddp.data.files import FileSamples
from mgpu_ddp.data.listing import Listing
from mgpu_ddp.data.row_group_cache import RowGroupCache
from mgpu_ddp.data.samples import Samples
from mgpu_ddp.distributed.sharding import Plan, ShardSampler
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import OutOfMemoryError, StateError
from mgpu_ddp.loader import shared_slots, worker_pool
from mgpu_ddp.loader.batch import Batch, as_batch
from mgpu_ddp.loader.jpegs import RECORD, PackedJpegs
from mgpu_ddp.loader.loader import COPYING_WORKERS, Pieces, load_batches, num_workers, plan_slots
from mgpu_ddp.loader.shared_slots import SharedSlots
from mgpu_ddp.loader.worker import BatchMaker, Made, Order
from mgpu_ddp.preprocess.transform import Pixels, StageClock, Transform, plain
from mgpu_ddp.preprocess.transform import decode as decode_image
from tests.support.choices import resolved
from tests.support.samples import encoded, photo

SIZE = 16


def settings(data: Any, workers: int | str = "auto") -> Config:
    loader = LoaderConfig(workers=workers)
    return Config(data=data, transform=TransformConfig(), model=ModelConfig(), loader=loader)


def folder(root: Path, files: dict[str, bytes]) -> FileSamples:
    """Samples of files with these contents, listed by name."""
    for name, data in files.items():
        (root / name).write_bytes(data)
    return FileSamples(str(root), Listing.build(sorted(name.encode() for name in files)))


def made(
    samples: Samples, indices: list[int], *, batch_size: int = 4, timeout_s: float = 60, packed: bool = False
) -> Batch:
    """One batch as a worker makes it in memory that was used before, and as its rank then sees it."""
    slots = SharedSlots(2, batch_size, (SIZE, SIZE, 3), packed=packed)
    slots.pixels(1)[:] = 99
    worker = BatchMaker(samples, plain(SIZE), slots, LoaderConfig(timeout_s=timeout_s), packed=packed)
    return as_batch(worker.make(Order(slot=1, indices=indices)), slots)


def test_a_short_batch_is_padded_with_zeros(tmp_path: Path) -> None:
    samples = folder(tmp_path, {f"{i}.png": encoded(photo(20, 20, i), "PNG") for i in range(3)})
    batch = made(samples, [2, 0])
    assert batch.pixels.shape == (4, SIZE, SIZE, 3)
    assert batch.pixels.dtype == torch.uint8
    for place, index in enumerate([2, 0]):
        expected = np.asarray(photo(20, 20, index).resize((SIZE, SIZE), 2))
        assert np.array_equal(batch.pixels[place].numpy(), expected)
    assert not batch.pixels[2:].any()
    assert (batch.index.tolist(), batch.index.dtype) == ([2, 0], np.int64)
    assert (batch.label.tolist(), batch.label.dtype) == ([-1, -1], np.int32)
    assert batch.errors == {}
    assert set(batch.seconds) == {"read", "decode", "resize"}


def test_a_bad_sample_costs_its_neighbours_nothing(tmp_path: Path) -> None:
    good = encoded(photo(20, 20), "PNG")
    files = {
        "0.png": good,
        "1.png": b"not an image\nat all",
        "2.png": good,
        "3.jpg": encoded(photo(90, 90), "JPEG")[:600],
        "4.png": good,
        "5.png": b"",
        "6.png": good[: len(good) // 2],
        "7.png": good,
    }
    samples = folder(tmp_path, files)
    (tmp_path / "7.png").unlink()
    batch = made(samples, list(range(8)), batch_size=8)
    assert sorted(batch.errors) == [1, 3, 5, 6, 7]
    for place in (0, 2, 4):
        assert torch.equal(batch.pixels[place], batch.pixels[0])
    assert batch.pixels[0].any()
    assert not batch.pixels[sorted(batch.errors)].any()
    assert batch.errors[1] == batch.errors[5] == "UnidentifiedImageError: empty, or not an image in an allowed format"
    assert batch.errors[7] == "FileNotFoundError: No such file or directory"
    assert "truncated" in batch.errors[3].lower()
    for reason in batch.errors.values():
        assert "\n" not in reason
        assert str(tmp_path) not in reason
        assert "0x" not in reason


def test_plain_jpegs_stay_encoded_for_the_gpu_and_the_rest_is_decoded(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "0.jpg": encoded(photo(20, 30), "JPEG"),
        "1.jpg": encoded(photo(20, 30), "JPEG", progressive=True),
        "2.png": encoded(photo(20, 30), "PNG"),
        "3.jpg": b"broken",
        "4.jpg": encoded(photo(30, 20), "JPEG", exif=exif),
        "5.jpg": encoded(photo(20, 30).convert("CMYK"), "JPEG"),
        "6.jpg": encoded(photo(20, 30), "JPEG")[:-40],
    }
    samples = folder(tmp_path, files)
    batch = made(samples, list(range(7)), batch_size=8, packed=True)
    assert batch.jpegs is not None
    jpegs = batch.jpegs
    assert (jpegs.rows.tolist(), jpegs.orientations.tolist()) == ([0, 4], [1, 6])
    assert (jpegs.heights.tolist(), jpegs.widths.tolist()) == ([30, 20], [20, 30])
    assert (jpegs.down.tolist(), jpegs.across.tolist()) == ([2, 2], [2, 2])
    assert [jpegs.content(number) for number in range(len(jpegs))] == [files["0.jpg"], files["4.jpg"]]
    assert sorted(batch.errors) == [3, 6]
    on_cpu = made(samples, list(range(7)), batch_size=8)
    assert on_cpu.jpegs is None
    for place in (1, 2, 3, 5, 6):
        assert torch.equal(batch.pixels[place], on_cpu.pixels[place])


def test_a_piece_ends_when_its_slot_has_its_share_of_encoded_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = encoded(photo(20, 30), "JPEG"), encoded(photo(300, 300), "JPEG", quality=95)
    assert len(small) < 1500 < 2000 < len(large)
    monkeypatch.setattr(shared_slots, "ENCODED_BYTES", 2000)
    samples = folder(tmp_path, {"0.png": encoded(photo(20, 30), "PNG"), "1.jpg": small, "2.jpg": large, "3.jpg": small})
    slots = SharedSlots(1, 4, (SIZE, SIZE, 3), packed=True)
    worker = BatchMaker(samples, plain(SIZE), slots, LoaderConfig(), packed=True)
    first = worker.make(Order(slot=0, indices=[0, 1, 2, 3]))
    assert (first.index.tolist(), first.label.tolist(), first.is_last) == ([0, 1, 2], [-1] * 3, False)
    batch = as_batch(first, slots)
    assert batch.jpegs is not None
    assert [batch.jpegs.content(number) for number in range(2)] == [small, large]
    assert set(batch.seconds) == {"read", "decode", "resize", "pack"}, "what the worker did but read counts as well"
    assert first.rest is not None
    rest = worker.make(first.rest)
    assert (rest.index.tolist(), rest.is_last, rest.rest) == ([3], True, None)


def test_the_file_alone_decides_who_decodes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = encoded(photo(20, 30), "JPEG"), encoded(photo(300, 300), "JPEG", quality=95)
    monkeypatch.setattr(shared_slots, "ROOM_BYTES", len(small) + len(large) - 1)
    monkeypatch.setattr(shared_slots, "_whole_pages", lambda num_bytes: num_bytes)
    samples = folder(tmp_path, {"0.jpg": small, "1.jpg": large, "2.jpg": small})
    slots = SharedSlots(1, 3, (SIZE, SIZE, 3), packed=True)
    worker = BatchMaker(samples, plain(SIZE), slots, LoaderConfig(), packed=True)
    order, found = Order(slot=0, indices=[0, 1, 2]), list[tuple[list[int], int, bool]]()
    while order is not None:
        piece = worker.make(order)
        assert piece.jpegs is not None
        found.append((piece.index.tolist(), len(piece.jpegs.records), piece.is_last))
        order = piece.rest
    assert found == [([0], 1, False), ([1], 1, False), ([2], 1, True)]


def test_what_the_room_does_not_hold_is_decoded_by_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_slots, "ROOM_BYTES", 4096)
    large = encoded(photo(300, 300), "JPEG", quality=95)
    assert len(large) > 4096
    samples = folder(tmp_path, {"0.jpg": large, "1.jpg": encoded(photo(20, 30), "JPEG")})
    batch = made(samples, [0, 1], packed=True)
    assert batch.jpegs is not None
    assert batch.jpegs.rows.tolist() == [1]
    assert torch.equal(batch.pixels[0], made(samples, [0, 1]).pixels[0])


def test_a_slot_gives_back_the_memory_of_a_large_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_slots, "ENCODED_BYTES", 2 << 20)
    slots = SharedSlots(2, 1, (SIZE, SIZE, 3), packed=True)
    for slot in range(2):
        slots.pixels(slot)[:] = 7
        slots.room(slot)[:] = 7
    slots.trim(0, len(slots.room(0)))
    assert slots.room(0).all()
    slots.trim(0, 3 << 20)
    assert slots.room(0)[: 3 << 20].all()
    assert not slots.room(0)[3 << 20 :].any()
    slots.trim(0, 100)
    assert slots.room(0)[: 2 << 20].all()
    assert not slots.room(0)[2 << 20 :].any()
    assert slots.pixels(0).all()
    assert slots.pixels(1).all()
    assert slots.room(1).all()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("share", [1, 3000, 1 << 20])
def test_pieces_come_in_order_and_make_whole_batches(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, share: int
) -> None:
    files = {f"{i:02}.jpg": encoded(photo(20 + i, 30), "JPEG") for i in range(37)}
    files["20.jpg"] = encoded(photo(300, 300), "JPEG", quality=95)
    samples, held = folder(tmp_path, files), 5
    choices = resolved(decode="gpu", workers=workers, batch_size=10)
    monkeypatch.setattr(shared_slots, "ENCODED_BYTES", share * (max(1, 2 * workers) + held))
    plan = Plan(start=0, stop=37, size=1, batch_size=10, contiguous=False, smallest_rows=10, largest_rows=10)
    found, ends, kept = dict[int, bytes](), list[int](), deque[tuple[Batch, list[bytes]]]()
    with load_batches(samples, ShardSampler(plan, 0), LoaderConfig(), choices, world, held=held) as pieces:
        for piece in pieces:
            jpegs = piece.jpegs
            assert jpegs is not None
            assert piece.batch_size == 10
            assert len(piece.index) <= len(piece.pixels)
            kept.append((piece, [jpegs.content(number) for number in range(len(jpegs))]))
            found |= zip(piece.index.tolist(), kept[-1][1], strict=True)
            if piece.is_last:
                ends.append(len(found))
            if len(kept) == held:
                oldest, contents = kept.popleft()
                assert oldest.jpegs is not None
                assert [oldest.jpegs.content(number) for number in range(len(contents))] == contents
    assert [*found.items()] == list(enumerate(files.values()))
    assert ends == [10, 20, 30, 37]


def test_orders_are_cut_by_what_the_images_before_weighed() -> None:
    pieces = Pieces([[*range(10)], [*range(10, 410)]], rows=256, share=1000)
    orders = iter(pieces)

    def made_of(order: Order, image_bytes: int) -> Made:
        index = np.array(order.indices)
        label = index.astype(np.int32)
        encoded_bytes = image_bytes * len(index)
        return Made(slot=0, index=index, label=label, errors={}, seconds={}, encoded_bytes=encoded_bytes)

    seen = [next(orders), next(orders)]
    pieces.seen(made_of(seen[0], 400))
    seen += [next(orders), next(orders)]
    assert [len(order.indices) for order in seen] == [4, 3, 2, 1]
    assert [order.is_last for order in seen] == [False, False, False, True]
    pieces.seen(made_of(seen[1], 0))
    assert [len(order.indices) for order in orders] == [200, 200]
    pieces.seen(made_of(seen[1], 5000))
    assert len(next(iter(pieces)).indices) == 1


@pytest.mark.parametrize(
    ("megapixels", "length"), [(1, 98), (4, 21), (5, 14), (12, 7), (60, 1), (101, 1)], ids=lambda number: f"{number}"
)
def test_a_piece_is_what_the_gpu_decodes_in_one_call(megapixels: int, length: int) -> None:
    pieces = Pieces([[*range(10 * length)]], rows=256, share=1 << 40)
    records = np.zeros(3, dtype=RECORD)
    index, label = np.arange(3), np.zeros(3, dtype=np.int32)
    jpegs = PackedJpegs(records=records, pixels=3_000_000 * megapixels)
    pieces.seen(Made(slot=0, index=index, label=label, errors={}, seconds={}, encoded_bytes=3, jpegs=jpegs))
    assert [len(order.indices) for order in pieces] == [length] * 10


@pytest.mark.parametrize("decode", ["cpu", "scaled"])
def test_workers_scale_jpegs_where_that_is_asked_for(world: World, tmp_path: Path, decode: str) -> None:
    data = encoded(photo(300, 200), "JPEG", quality=95)
    samples, choices = folder(tmp_path, {"0.jpg": data}), resolved(decode=decode, batch_size=1, transform=plain(SIZE))
    plan = Plan(start=0, stop=1, size=1, batch_size=1, contiguous=False, smallest_rows=1, largest_rows=1)
    with load_batches(samples, ShardSampler(plan, 0), LoaderConfig(), choices, world, held=1) as batches:
        (batch,) = list(batches)
    want = plain(SIZE).geometry(decode_image(data, SIZE if decode == "scaled" else None))
    assert batch.jpegs is None
    assert np.array_equal(batch.pixels[0].numpy(), want)


@pytest.mark.parametrize("limit", [599, 600])
def test_images_past_the_limit_of_pixels_stay_off_the_gpu(tmp_path: Path, limit: int) -> None:
    samples = folder(tmp_path, {"0.jpg": encoded(photo(20, 30), "JPEG")})
    slots = SharedSlots(1, 2, (SIZE, SIZE, 3), packed=True)
    worker = BatchMaker(samples, plain(SIZE), slots, LoaderConfig(max_pixels=limit), packed=True)
    batch = as_batch(worker.make(Order(slot=0, indices=[0])), slots)
    assert batch.jpegs is not None
    assert len(batch.jpegs) == (limit == 600)


def test_slots_are_used_again_only_when_the_consumer_has_let_go(world: World) -> None:
    samples = FakeSamples(FakeConfig(size=400, image_size=[3, 8, 8]))
    plan = Plan(start=0, stop=400, size=1, batch_size=4, contiguous=False, smallest_rows=8, largest_rows=8)
    choices, held = resolved(workers=2), 5
    kept: deque[tuple[Batch, torch.Tensor]] = deque()
    transform = plain(8)
    with load_batches(samples, ShardSampler(plan, 0), LoaderConfig(), choices, world, held=held) as batches:
        for batch in batches:
            kept.append((batch, batch.pixels.clone()))
            if len(kept) == held:
                oldest, pixels = kept.popleft()
                assert torch.equal(oldest.pixels, pixels)
                expected, _ = samples.load(int(oldest.index[0]), transform, lambda *_: None)
                assert np.array_equal(pixels[0].numpy(), expected)


class Odd(Samples):
    """A dataset whose samples raise what they are told to."""

    def __init__(self, *errors: Callable[[], Exception] | None) -> None:
        self._errors = errors

    def __len__(self) -> int:
        return len(self._errors)

    def load(
        self, index: int, transform: Transform, clock: StageClock, data: bytes | None = None
    ) -> tuple[Pixels, int]:
        error = self._errors[index]
        if error is not None:
            raise error()
        return np.full((*transform.out_size, 3), 7, dtype=np.uint8), index

    def known_label(self, index: int) -> int:
        return index + 100


def test_any_exception_of_a_decoder_is_one_bounded_line() -> None:
    samples = Odd(
        lambda: ValueError("two\n  lines"), None, lambda: SyntaxError("broken PNG"), lambda: MemoryError("x" * 9000)
    )
    batch = made(samples, [0, 1, 2, 3])
    assert batch.errors[0] == "ValueError: two lines"
    assert batch.errors[2] == "SyntaxError: broken PNG"
    assert len(batch.errors[3]) == 500
    assert batch.label.tolist() == [100, 1, 102, 103], "an error row keeps the label that its listing knows"
    assert (batch.pixels[1] == 7).all()


def test_a_request_to_stop_is_no_bad_sample() -> None:
    class Interrupted(Odd):
        def load(
            self, index: int, transform: Transform, clock: StageClock, data: bytes | None = None
        ) -> tuple[Pixels, int]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(Interrupted(None), [0])


def test_a_sample_that_blocks_becomes_an_error_row(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    good = encoded(photo(20, 20), "PNG")
    for name in ("0.png", "1.png", "2.png"):
        (tmp_path / name).write_bytes(good)

    class Blocked(FileSamples):
        def fetch(self, index: int) -> bytes:
            if index == 1:
                # Opening it waits for a writer that never comes, like a dead mount.
                (tmp_path / "pipe").read_bytes()
            return super().fetch(index)

    samples = Blocked(str(tmp_path), Listing.build([b"0.png", b"1.png", b"2.png"]))
    before = signal.getsignal(signal.SIGALRM)
    started = time.perf_counter()
    batch = made(samples, [0, 1, 2], timeout_s=0.2)
    assert 0.2 <= time.perf_counter() - started < 10
    assert batch.errors == {1: "TimeoutError: took longer than loader.timeout_s=0.2"}
    assert torch.equal(batch.pixels[0], batch.pixels[2])
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 5])
def test_batches_come_once_and_in_order(world: World, workers: int, start: int) -> None:
    samples = FakeSamples(FakeConfig(size=23, image_size=[3, 8, 8]))
    plan = Plan(
        start=start,
        stop=23,
        size=1,
        batch_size=4,
        contiguous=False,
        smallest_rows=8,
        largest_rows=8,
    )
    choices, transform = resolved(workers=workers), plain(8)
    with load_batches(samples, ShardSampler(plan, 0), LoaderConfig(), choices, world, held=100) as loaded:
        batches = list(loaded)
    assert [i for batch in batches for i in batch.index.tolist()] == list(range(start, 23))
    assert all(len(batch.pixels) == 4 for batch in batches)
    for batch in batches:
        for place, index in enumerate(batch.index.tolist()):
            pixels, label = samples.load(index, transform, lambda *_: None)
            assert np.array_equal(batch.pixels[place].numpy(), pixels)
            assert batch.label[place] == label


class Told(Odd):
    """Samples that say when they are made, of which one waits for another."""

    def __init__(self, size: int, *, waits: int, for_: int) -> None:
        super().__init__(*[None] * size)
        context = multiprocessing.get_context("fork")
        self.made = [context.Event() for _ in range(size)]
        self._waits, self._for = waits, for_

    def load(
        self, index: int, transform: Transform, clock: StageClock, data: bytes | None = None
    ) -> tuple[Pixels, int]:
        if index == self._waits:
            assert self.made[self._for].wait(20)
        self.made[index].set()
        return super().load(index, transform, clock, data)


def test_a_worker_that_is_slow_holds_up_no_order_but_its_own(world: World) -> None:
    # In turns, the worker that waits for order 4 to be made would be given that as well.
    samples = Told(12, waits=2, for_=4)
    plan = Plan(start=0, stop=12, size=1, batch_size=1, contiguous=False, smallest_rows=12, largest_rows=12)
    choices = resolved(workers=2, batch_size=1)
    with load_batches(samples, ShardSampler(plan, 0), LoaderConfig(prefetch=4), choices, world, held=1) as batches:
        seen = list(batches)
    assert [int(batch.index[0]) for batch in seen] == list(range(12))
    assert not any(batch.errors for batch in seen)


def test_what_a_worker_raises_is_told_with_its_traceback(world: World) -> None:
    class Broken(Odd):
        def known_label(self, index: int) -> int:
            raise ZeroDivisionError

    plan = Plan(start=0, stop=2, size=1, batch_size=1, contiguous=False, smallest_rows=2, largest_rows=2)
    samples, choices = Broken(None, ValueError), resolved(workers=1, batch_size=1)
    with (
        load_batches(samples, ShardSampler(plan, 0), LoaderConfig(), choices, world, held=1) as batches,
        pytest.raises(RuntimeError, match=r"(?s)Traceback.*in known_label.*ZeroDivisionError"),
    ):
        list(batches)


class Stops(Odd):
    """Samples of which some stop the process that makes them, the first `times` times."""

    def __init__(self, size: int, stopping: dict[int, int]) -> None:
        super().__init__(*[None] * size)
        context = multiprocessing.get_context("fork")
        self._left = {index: context.Value("i", times) for index, times in stopping.items()}

    def load(
        self, index: int, transform: Transform, clock: StageClock, data: bytes | None = None
    ) -> tuple[Pixels, int]:
        left = self._left.get(index)
        if left is not None and left.value > 0:
            left.value -= 1
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().load(index, transform, clock, data)


def load_watched(samples: Samples, world: World, *, workers: int) -> tuple[dict[int, int], dict[int, str]]:
    """Labels and errors of all samples in batches of four, with workers that may hang for half a second."""
    number = len(samples)
    plan = Plan(start=0, stop=number, size=1, batch_size=4, contiguous=False, smallest_rows=number, largest_rows=number)
    config, choices = LoaderConfig(timeout_s=0.5), resolved(workers=workers)
    labels: dict[int, int] = {}
    errors: dict[int, str] = {}
    with load_batches(samples, ShardSampler(plan, 0), config, choices, world, held=1) as batches:
        for batch in batches:
            assert not labels.keys() & set(batch.index.tolist())
            labels |= zip(batch.index.tolist(), batch.label.tolist(), strict=True)
            errors |= batch.errors
            for row, index in enumerate(batch.index.tolist()):
                assert (batch.pixels[row] == (0 if index in batch.errors else 7)).all()
    assert list(labels) == list(range(number))
    return labels, errors


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that replaces workers soon."""
    monkeypatch.setattr(worker_pool, "MARGIN_S", 0.1)
    monkeypatch.setattr(worker_pool, "POLL_S", 0.05)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("workers", [1, 3])
def test_what_a_stopped_worker_had_is_made_by_another(
    world: World, workers: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mgpu_ddp"), "propagate", True)
    labels, errors = load_watched(Stops(18, {6: 1, 17: 1}), world, workers=workers)
    assert errors == {}
    assert labels == {index: index for index in range(18)}
    assert caplog.records[0].args is not None
    assert list(caplog.records[0].args)[1:] == ["sample", 6]


@pytest.mark.usefixtures("impatient")
def test_a_sample_that_hangs_two_workers_is_an_error_row(world: World) -> None:
    labels, errors = load_watched(Stops(10, {1: 99, 3: 99, 8: 1}), world, workers=2)
    assert errors == dict.fromkeys((1, 3), "TimeoutError: a loader worker hung for 0.6 s, 2 times")
    assert labels == {index: index + 100 * (index in errors) for index in range(10)}


@pytest.mark.usefixtures("impatient")
def test_a_whole_batch_that_hangs_is_made_sample_by_sample(world: World) -> None:
    class Whole(Stops):
        def fill(self, indices: Sequence[int], transform: Transform, pixels: Pixels, clock: StageClock) -> bool:
            if 5 in indices:
                os.kill(os.getpid(), signal.SIGSTOP)
            pixels[: len(indices)] = 7
            return True

    labels, errors = load_watched(Whole(12, {6: 99}), world, workers=2)
    assert errors.keys() == {6}
    assert (labels[0], labels[5], labels[9]) == (-1, 5, -1)


@pytest.mark.usefixtures("impatient")
def test_a_worker_that_hangs_in_a_shared_row_group_costs_no_row(world: World) -> None:
    class Grouped(Stops):
        """Samples of one row group, whose first reader stops."""

        cache = RowGroupCache(4096)

        def load(
            self, index: int, transform: Transform, clock: StageClock, data: bytes | None = None
        ) -> tuple[Pixels, int]:
            assert self.cache.get(0, index, self.read_group) == b"%d" % index
            return Odd.load(self, index, transform, clock, data)

        def read_group(self) -> Any:
            Stops.load(self, 0, plain(SIZE), lambda *_: None)
            return pa.array([b"%d" % index for index in range(len(self))])

    labels, errors = load_watched(Grouped(24, {0: 1}), world, workers=3)
    assert errors == {}
    assert labels == {index: index for index in range(24)}


@pytest.mark.usefixtures("impatient")
def test_idle_workers_that_were_stopped_are_replaced() -> None:
    pool = worker_pool.WorkerPool(
        BatchMaker(Odd(*[None] * 8), plain(SIZE), SharedSlots(2, 4, (SIZE, SIZE)), LoaderConfig(timeout_s=0.5)), 2, 2
    )
    with closing(pool):
        for process in multiprocessing.active_children():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGSTOP)
        made = list(pool.make(iter([Order(indices=[0, 1, 2, 3]), Order(indices=[4, 5])]), ahead=2, held=1))
    assert [each.index.tolist() for each in made] == [[0, 1, 2, 3], [4, 5]]


@pytest.mark.usefixtures("impatient")
def test_workers_that_hang_before_they_begin_end_the_job_in_one_line(world: World) -> None:
    class Stuck(Odd):
        def expect(self, indices: Sequence[int]) -> None:
            os.kill(os.getpid(), signal.SIGSTOP)

    with pytest.raises(StateError, match=r"a loader worker hung for 0.6 s 2 times before the first sample of a batch"):
        load_watched(Stuck(*[None] * 4), world, workers=2)


@pytest.mark.usefixtures("impatient")
def test_a_worker_that_was_stopped_amid_its_result_is_replaced() -> None:
    """The result is larger than its pipe, whose other end nobody reads until the worker has stopped."""
    number = worker_pool.PIPE_BYTES // 50
    samples = Odd(*[functools.partial(ValueError, "x" * 500)] * number)
    slots = SharedSlots(1, number, (SIZE, SIZE))
    maker = BatchMaker(samples, plain(SIZE), slots, LoaderConfig(timeout_s=0.5))
    with closing(worker_pool.WorkerPool(maker, 1, 1)) as pool:
        (before,), made = pool._workers.processes, dict[int, Made]()
        assert before.pid is not None
        pool._give(0, Order(indices=[*range(number)]))
        (pipe,) = pool._workers._selector.get_map()
        deadline = time.monotonic() + 20
        while bytes_in(pipe) < worker_pool.PIPE_BYTES // 2:
            assert time.monotonic() < deadline
        os.kill(before.pid, signal.SIGSTOP)
        pool._wait_for(0, made)
        assert len(pickle.dumps(made[0])) > worker_pool.PIPE_BYTES
        assert pool._workers.processes[0].pid != before.pid


def test_what_a_worker_made_before_it_died_is_taken() -> None:
    pipe, into = os.pipe()
    results = worker_pool.Results(pipe)
    data = pickle.dumps((3, "made"))
    with closing(results):
        os.write(into, worker_pool.LENGTH.pack(len(data)) + data[:5])
        assert list(results.read()) == list(results.read()) == []
        os.write(into, data[5:])
        os.close(into)
        reading = results.read()
        assert next(reading) == (3, "made")
        with pytest.raises(EOFError):
            next(reading)


def bytes_in(pipe: int) -> int:
    """How much can be read from a pipe."""
    return struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_no_samples_give_no_batches(world: World, workers: int) -> None:
    plan = Plan(start=0, stop=0, size=1, batch_size=4, contiguous=False, smallest_rows=8, largest_rows=8)
    samples = FakeSamples(FakeConfig(size=0))
    choices = resolved(workers=workers)
    with load_batches(samples, ShardSampler(plan, 0), LoaderConfig(), choices, world, held=100) as batches:
        assert list(batches) == []


def test_slots_are_as_many_as_the_job_uses_and_fit_into_memory(world: World) -> None:
    def plan(rows: int, **choices: Any) -> int:
        config = LoaderConfig(prefetch=3)
        return plan_slots(FakeSamples(FakeConfig()), rows, config, resolved(workers=2, **choices), world, held=4)[0]

    assert [plan(rows) for rows in (0, 9, 1000)] == [1, 3, 10]
    with pytest.raises(
        OutOfMemoryError, match=r"^batch_size must fit into memory, got 100000000: it takes .* Lower it"
    ):
        plan(10**12, batch_size=10**8)
    with pytest.raises(OutOfMemoryError, match=r"^transform\.size must fit into memory, got 1000000: it takes "):
        plan(1, batch_size=1, transform=plain(10**6))


def test_auto_workers_are_this_processes_cpus(world: World) -> None:
    cpus = len(os.sched_getaffinity(0))
    assert num_workers(settings(FakeConfig()), world) == cpus
    assert num_workers(settings(FakeConfig(), workers=0), world) == 0


def test_what_is_only_copied_to_a_gpu_takes_few_workers(world: World) -> None:
    on_gpu = replace(world, device=torch.device("cuda", 0), share_of_cpus=COPYING_WORKERS + 5)
    array = ArrayConfig(path="x.npy")
    assert num_workers(settings(array), on_gpu) == COPYING_WORKERS
    assert num_workers(settings(array), replace(on_gpu, device=torch.device("cpu"))) == COPYING_WORKERS + 5
    assert num_workers(settings(FakeConfig()), on_gpu) == COPYING_WORKERS + 5
    assert num_workers(settings(array, workers=7), on_gpu) == 7
