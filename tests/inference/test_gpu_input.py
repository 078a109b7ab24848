"""Pieces that are decoded together: which row is whose, one copy of all their files, and what is begun when."""

import functools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mgpu_ddp.config.schema import (
    Config,
    DataConfig,
    FakeConfig,
    FolderConfig,
    LoaderConfig,
    ModelConfig,
    RuntimeConfig,
    TransformConfig,
)
from mgpu_ddp.data.files import FileSamples
from mgpu_ddp.data.listing import Listing
from mgpu_ddp.errors import UsageError
from mgpu_ddp.inference import gpu_input
from mgpu_ddp.inference.gpu_input import Contenders, Decoded, Portion, Staged, Staging, Zeros, copied
from mgpu_ddp.loader.batch import Batch, as_batch
from mgpu_ddp.loader.jpegs import COLUMNS, Jpegs
from mgpu_ddp.loader.shared_slots import SharedSlots
from mgpu_ddp.loader.worker import BatchMaker, Order
from mgpu_ddp.preprocess.transform import TensorInput, plain
from tests.support.choices import resolved
from tests.support.samples import encoded, photo

SIDE, BATCH_SIZE = 16, 3
ORDERS = [[0, 1, 2], [3, 4, 5], [6, 7]]
JPEGS = [0, 2, 4, 6, 7]


@functools.cache
def files() -> dict[str, bytes]:
    # More than 3 MB.
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1800, 1600, 3), dtype=np.uint8))
    return {
        "0.jpg": encoded(photo(20, 30), "JPEG"),
        "1.png": encoded(photo(21, 30), "PNG"),
        "2.jpg": encoded(photo(22, 30), "JPEG"),
        "3.jpg": b"broken",
        "4.jpg": encoded(large, "JPEG", quality=95),
        "5.png": encoded(photo(25, 30), "PNG"),
        "6.jpg": encoded(photo(26, 30), "JPEG"),
        "7.jpg": encoded(photo(27, 30), "JPEG"),
    }


def batches(root: Path, orders: Sequence[list[int]]) -> list[Batch]:
    """Batches of `files` by a worker that leaves JPEGs encoded, each in a slot of its own that was used before."""
    for name, data in files().items():
        (root / name).write_bytes(data)
    samples = FileSamples(str(root), Listing.build(sorted(name.encode() for name in files())))
    slots = SharedSlots(len(orders), BATCH_SIZE, (SIDE, SIDE, 3), packed=True)
    worker = BatchMaker(samples, plain(SIDE), slots, LoaderConfig(), packed=True)
    for slot in range(len(orders)):
        slots.pixels(slot)[:] = 99
    return [as_batch(worker.make(Order(slot=slot, indices=order)), slots) for slot, order in enumerate(orders)]


def test_each_row_of_a_portion_is_made_of_a_jpeg_or_of_pixels(tmp_path: Path) -> None:
    made = batches(tmp_path, ORDERS)
    portion = Portion(made, [10, 13, 16])
    assert portion.jpegs.rows.tolist() == [10 + row for row in JPEGS]
    assert portion.jpegs.widths.tolist() == [20, 22, 1600, 26, 27]
    # Neither JPEGs nor the row past the last sample; the broken image is a row of zeros.
    found = [(rows.tolist(), pixels) for rows, pixels in portion.pixels()]
    assert [rows for rows, _ in found] == [[11], [13, 15]]
    assert torch.equal(found[0][1], made[0].pixels[[1]])
    assert torch.equal(found[1][1], made[1].pixels[[0, 2]])
    assert not made[1].pixels[0].any()


def test_a_refused_jpeg_is_decoded_into_its_own_piece_and_row(tmp_path: Path) -> None:
    made = batches(tmp_path, ORDERS)
    portion, transform = Portion(made, [10, 13, 16]), plain(SIDE)
    portion.decode_on_cpu(4, transform.geometry)
    want = np.asarray(Image.open(tmp_path / "7.jpg").resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    assert np.array_equal(made[2].pixels[1].numpy(), want)
    assert [rows.tolist() for rows, _ in portion.pixels()] == [[11], [13, 15], [17]]
    assert [set(batch.errors) for batch in made] == [set(), {3}, set()]


def test_what_pillow_refuses_as_well_is_an_error_of_its_own_piece(tmp_path: Path) -> None:
    made = batches(tmp_path, ORDERS)
    portion = Portion(made, [0, 3, 6])

    def refuse(_image: Image.Image) -> np.ndarray:
        raise ValueError("no")

    portion.decode_on_cpu(2, refuse)
    assert [batch.errors for batch in made] == [{}, {3: made[1].errors[3], 4: "ValueError: no"}, {}]
    assert not made[1].pixels[1].any()
    assert [rows.tolist() for rows, _ in portion.pixels()] == [[1], [3, 4, 5]]


def test_several_pieces_are_decoded_from_one_copy_of_their_files(tmp_path: Path) -> None:
    portion = Portion(batches(tmp_path, ORDERS), [0, 3, 6])  # keeps the memory that its JPEGs lie in
    jpegs = portion.jpegs
    copies = torch.zeros(int(jpegs.lengths.sum()), dtype=torch.uint8)
    where = copied(jpegs, copies)
    assert copies.numpy().tobytes() == b"".join(files()[f"{i}.jpg"] for i in JPEGS)
    assert (where.addresses - copies.data_ptr()).tolist() == [0, *np.cumsum(jpegs.lengths)[:-1].tolist()]
    none = Portion(batches(tmp_path, [[3]]), [0]).jpegs
    assert len(copied(none, torch.empty(0, dtype=torch.uint8)).addresses) == 0


@pytest.mark.parametrize(
    ("sizes", "runs"),
    [
        ([], []),
        ([4, 4, 4, 4], [[0, 1], [2, 3]]),
        ([9, 1], [[0], [1]]),
        ([1, 9, 1, 8], [[0], [1], [2], [3]]),
        ([8], [[0]]),
    ],
)
def test_what_is_decoded_at_once_is_bounded(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int], runs: list[list[int]]
) -> None:
    monkeypatch.setattr(gpu_input, "MAX_DECODED_PIXELS", 8)
    assert [run.tolist() for run in gpu_input._runs(np.array(sizes, dtype=np.int64))] == runs


class Decoding:
    """Stands in for `GpuInput` where there is no GPU: a portion's rows are made when the test says so."""

    THREADS = 1

    def __init__(self) -> None:
        self.portions: list[Portion] = []
        self.go = threading.Semaphore(0)

    def zeros(self, rows: int) -> Zeros:
        return Zeros(images=torch.zeros(rows, 1), zeroed=None)  # type: ignore[arg-type]

    def decode(self, portion: Portion, into: Zeros) -> Decoded:
        assert self.go.acquire(timeout=60)
        self.portions.append(portion)
        into.images[portion.jpegs.rows] = torch.from_numpy(portion.jpegs.widths)[:, None].float()
        return Decoded(made=None, decode_s=1.0)  # type: ignore[arg-type]

    def check(self) -> None:
        """It does not hang."""


def pieces(sizes: Sequence[int], rows: int, pixels: int = 100, batch_size: int | None = None) -> Iterator[Batch]:
    """Batches of so many rows of JPEGs, whose widths tell them apart, in pieces of these sizes."""
    number = left = 0
    for size in sizes:
        left = left or rows
        one = np.ones(size, dtype=np.int64)
        widths = number + np.arange(size)
        columns = dict.fromkeys(COLUMNS, one) | {"rows": np.arange(size), "widths": widths, "heights": one * pixels}
        columns |= {"addresses": 1 + widths, "windows": np.zeros((size, 4), dtype=np.int64)}
        left -= size
        yield Batch(
            index=widths,
            label=one.astype(np.int32),
            pixels=torch.empty(size, 1),
            jpegs=Jpegs(**columns),
            errors={},
            seconds={"read": 1.0},
            batch_size=batch_size or rows,
            rows=rows,
            is_last=left == 0,
        )
        number += size


def staged_by(staging: Staging, sizes: Sequence[int], rows: int, pixels: int = 100) -> list[Staged]:
    return [staged for each in pieces(sizes, rows, pixels) if (staged := staging.submit(each)) is not None]


@pytest.mark.parametrize(
    ("rows", "sizes", "pixels", "portions"),
    [
        (256, [128] * 4, 1, [256, 256]),
        (256, [64] * 4, 2000, [256]),
        (256, [32] * 8, 1, [256]),
        (600, [200] * 3, 1, [400, 200]),
        (256, [4] * 128, 1, [256, 256]),
        (256, [32] * 16, 1 << 21, [32] * 16),
        (512, [256, 256], 1, [256, 256]),
        (36, [3] * 24, 1, [36, 36]),
    ],
)
def test_a_portion_ends_when_it_is_worth_a_call(rows: int, sizes: list[int], pixels: int, portions: list[int]) -> None:
    inputs = Decoding()
    inputs.go.release(100)
    with closing(Staging(inputs)) as staging:  # type: ignore[arg-type]
        staged = staged_by(staging, sizes, rows, pixels)
        assert len(staged) == sum(sizes) // rows
        seen = torch.cat([staging.wait(each).images for each in staged]).flatten()
        assert seen.tolist() == list(range(sum(sizes)))
        assert sorted(len(portion.jpegs) for portion in inputs.portions) == sorted(portions)
        assert staging.take_decode_s() == len(portions)
        assert staging.take_decode_s() == 0
    for each, first in zip(staged, range(0, sum(sizes), rows), strict=True):
        assert each.batch.index.tolist() == list(range(first, first + rows))
        assert each.batch.seconds == {"read": len(each.pieces)}


@pytest.mark.parametrize(
    ("share", "most"), [(0.0, gpu_input.PORTIONS), (0.9, gpu_input.LARGE_PORTIONS), (2.0, 2), (5.0, 1)]
)
def test_portions_at_work_are_bounded_in_number_and_in_pixels(
    monkeypatch: pytest.MonkeyPatch, share: float, most: int
) -> None:
    inputs, waited = Decoding(), list[int]()
    await_, pixels = Staging._await, int(share * gpu_input.MAX_DECODED_PIXELS)

    def awaited(staging: Staging, futures: Sequence[Future[Decoded]]) -> None:
        waited.append(len(staging._begun))
        inputs.go.release()
        await_(staging, futures)

    monkeypatch.setattr(gpu_input, "_pixels", lambda piece: pixels)
    monkeypatch.setattr(Staging, "_await", awaited)
    with closing(Staging(inputs)) as staging:  # type: ignore[arg-type]
        staged_by(staging, [256] * 10, 256)
        assert waited == [most] * (10 - most)
        inputs.go.release(10)


def test_a_batch_is_done_once_all_its_portions_are() -> None:
    inputs = Decoding()
    with closing(Staging(inputs)) as staging:  # type: ignore[arg-type]
        first, second = staged_by(staging, [128] * 8, 512)
        inputs.go.release(1)
        wait(first.begun[:1])
        assert not first.is_done()
        inputs.go.release(1)
        staging.wait(first)
        assert first.is_done()
        assert not second.is_done()
        inputs.go.release(3)


def test_what_is_begun_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the pieces that wait for the decoder would be overwritten."""
    monkeypatch.setattr(gpu_input, "LOOK_S", 0.01)
    inputs = Decoding()
    given, over = [0], threading.Event()

    def give() -> None:
        for piece in pieces([16] * 64, 256):
            staging.submit(piece)
            given[0] += 1
        over.set()

    with closing(Staging(inputs)) as staging:  # type: ignore[arg-type]
        thread = threading.Thread(target=give, daemon=True)
        thread.start()
        most = gpu_input.held_pieces(resolved(decode="gpu", batch_size=16))
        while not over.wait(0.05):
            done = 16 * len(inputs.portions)
            assert given[0] - done < most
            inputs.go.release()
        thread.join()
        inputs.go.release(100)
    assert given[0] == 64


def test_input_of_a_batch_waits_for_memory_that_portions_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, zeros, tried = Decoding(), Decoding.zeros, list[int]()

    def scarce(self: Decoding, rows: int) -> Zeros:
        tried.append(len(self.portions))
        if tried == [0, 0]:
            self.go.release()
            raise torch.OutOfMemoryError
        return zeros(self, rows)

    monkeypatch.setattr(Decoding, "zeros", scarce)
    with closing(Staging(inputs)) as staging:  # type: ignore[arg-type]
        staged_by(staging, [256, 256], 256)
        inputs.go.release()
    assert tried == [0, 0, 1]


def test_who_lacks_memory_waits_for_another_to_end() -> None:
    contenders, waits, may_end = Contenders(), threading.Event(), threading.Event()

    def other() -> None:
        with contenders.working():
            waits.set()
            assert may_end.wait(60)

    with ThreadPoolExecutor(1) as threads, contenders.working():
        ended = threads.submit(other)
        assert waits.wait(60)
        threading.Timer(0.05, may_end.set).start()
        assert contenders.wait(contenders.num_left)
        ended.result()
        assert not contenders.wait(contenders.num_left)
        # One that ends meanwhile has left its memory as well.
        before = contenders.num_left
        threads.submit(other).result()
        assert contenders.wait(before)
        assert not contenders.wait(contenders.num_left)


def test_of_several_that_lack_memory_one_never_waits() -> None:
    contenders, are_in, rounds = Contenders(), threading.Barrier(4), list[bool]()

    def lack() -> None:
        with contenders.working():
            are_in.wait(60)
            while contenders.wait(contenders.num_left):
                rounds.append(True)

    with ThreadPoolExecutor(4) as threads:
        done, not_done = wait([threads.submit(lack) for _ in range(4)], timeout=60)
    assert not not_done
    assert all(future.exception() is None for future in done)
    assert rounds, "the others have waited"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_scaled_decoding_runs_wherever_images_come_as_files(device: str, tmp_path: Path) -> None:
    def decode_with(data: DataConfig, own: TensorInput | None = None) -> str:
        runtime = RuntimeConfig(decode="scaled")
        config = Config(data=data, transform=TransformConfig(), model=ModelConfig(), runtime=runtime)
        return gpu_input.decode_of(config, torch.device(device), own=own)

    folder = FolderConfig(root=str(tmp_path))
    assert decode_with(folder) == "scaled"
    with pytest.raises(UsageError, match=r"^runtime.decode must be cpu or auto where images do not come as files, got"):
        decode_with(FakeConfig())
    with pytest.raises(UsageError, match=r"where the script's transform takes a PIL image, got 'scaled'"):
        decode_with(folder, TensorInput(shape=(3, 8, 8)))
    assert not resolved(decode="scaled").on_gpu
