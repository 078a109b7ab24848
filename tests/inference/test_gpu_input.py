"""Batches that are decoded together: which row is whose, and one copy of all their files."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mgpu_ddp.config.schema import LoaderConfig
from mgpu_ddp.data.files import FileSamples
from mgpu_ddp.data.listing import Listing
from mgpu_ddp.inference import gpu_input
from mgpu_ddp.inference.gpu_input import BatchGroup, copied
from mgpu_ddp.loader.batch import Batch, as_batch
from mgpu_ddp.loader.shared_slots import SharedSlots
from mgpu_ddp.loader.worker import BatchMaker, Order
from mgpu_ddp.preprocess.transform import plain
from tests.support.samples import encoded, photo

SIDE, BATCH_SIZE = 16, 3
ORDERS = [[0, 1, 2], [3, 4, 5], [6, 7]]
JPEGS = [0, 2, 4, 6, 7]


@functools.cache
def files() -> dict[str, bytes]:
    # More than 3 MB, which do not fit into a slot's room.
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


def test_rows_of_a_group_lie_one_batch_after_the_other(tmp_path: Path) -> None:
    made = batches(tmp_path, ORDERS)
    group = BatchGroup(made)
    assert len(group) == 9
    assert group.jpegs.rows.tolist() == JPEGS
    assert group.jpegs.widths.tolist() == [20, 22, 1600, 26, 27]
    # Neither JPEGs nor the row past the last sample; the broken image is a row of zeros.
    found = [(rows.tolist(), pixels) for rows, pixels in group.pixels()]
    assert [rows for rows, _ in found] == [[1], [3, 5]]
    assert torch.equal(found[0][1], made[0].pixels[[1]])
    assert torch.equal(found[1][1], made[1].pixels[[0, 2]])
    assert not made[1].pixels[0].any()
    assert [part.tolist() for part in group.split(torch.arange(9))] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_a_refused_jpeg_is_decoded_into_its_own_batch_and_row(tmp_path: Path) -> None:
    made = batches(tmp_path, ORDERS)
    group, transform = BatchGroup(made), plain(SIDE)
    group.decode_on_cpu(4, transform.geometry)
    want = np.asarray(Image.open(tmp_path / "7.jpg").resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    assert np.array_equal(made[2].pixels[1].numpy(), want)
    assert [rows.tolist() for rows, _ in group.pixels()] == [[1], [3, 5], [7]]
    assert [set(batch.errors) for batch in made] == [set(), {3}, set()]


def test_what_pillow_refuses_as_well_is_an_error_of_its_own_batch(tmp_path: Path) -> None:
    made = batches(tmp_path, ORDERS)
    group = BatchGroup(made)

    def refuse(_image: Image.Image) -> np.ndarray:
        raise ValueError("no")

    group.decode_on_cpu(2, refuse)
    assert [batch.errors for batch in made] == [{}, {3: made[1].errors[3], 4: "ValueError: no"}, {}]
    assert not made[1].pixels[1].any()
    assert [rows.tolist() for rows, _ in group.pixels()] == [[1], [3, 4, 5]]


def test_several_batches_are_decoded_from_one_copy_of_their_files(tmp_path: Path) -> None:
    group = BatchGroup(batches(tmp_path, ORDERS))  # keeps the memory that its JPEGs lie in
    jpegs = group.jpegs
    copies = torch.zeros(int(jpegs.lengths.sum()), dtype=torch.uint8)
    where = copied(jpegs, copies)
    assert copies.numpy().tobytes() == b"".join(files()[f"{i}.jpg"] for i in JPEGS)
    assert (where.addresses - copies.data_ptr()).tolist() == [0, *np.cumsum(jpegs.lengths)[:-1].tolist()]
    none = BatchGroup(batches(tmp_path, [[3]])).jpegs
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
    assert [run.tolist() for run in gpu_input._portions(np.array(sizes, dtype=np.int64))] == runs
