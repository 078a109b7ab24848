"""Anything at all through the image path and the command line, for a bounded time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mgpu_ddp.config.command_line import check_command
from mgpu_ddp.config.help import documented_keys
from mgpu_ddp.config.schema import LoaderConfig
from mgpu_ddp.data.files import FileSamples
from mgpu_ddp.data.listing import Listing
from mgpu_ddp.errors import UsageError
from mgpu_ddp.loader.batch import as_batch
from mgpu_ddp.loader.shared_slots import SharedSlots
from mgpu_ddp.loader.worker import BatchMaker, Order
from mgpu_ddp.preprocess import transform
from tests.support.samples import encoded, photo

KINDS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF")
SEEDS = [encoded(photo(23, 17), kind) for kind in KINDS]


def bounded(examples: int) -> settings:
    """So many examples, the same ones every time, kept nowhere."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def damaged_images(draw: st.DrawFn) -> bytes:
    """A real image file with bytes changed, cut out or put in."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        how = draw(st.sampled_from(["change", "cut", "insert", "end"]))
        if how == "change" and data:
            data[place] = draw(st.integers(0, 255))
        elif how == "cut":
            del data[place : place + draw(st.integers(1, 40))]
        elif how == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=8))
        else:
            del data[place:]
    return bytes(data)


@bounded(200)
@given(data=st.one_of(damaged_images(), st.binary(max_size=200)))
def test_any_bytes_become_one_row_and_leave_the_neighbours_alone(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    root = tmp_path_factory.getbasetemp() / "fuzz"
    root.mkdir(exist_ok=True)
    good = encoded(photo(20, 20), "PNG")
    for name, content in (("0.png", good), ("1.png", data), ("2.png", good)):
        (root / name).write_bytes(content)
    samples = FileSamples(str(root), Listing.build([b"0.png", b"1.png", b"2.png"]))
    slots = SharedSlots(1, 4, (16, 16, 3))
    worker = BatchMaker(samples, transform.imagenet(16), slots, LoaderConfig(timeout_s=10))
    batch = as_batch(worker.make(Order(slot=0, indices=[0, 1, 2])), slots)
    assert set(batch.errors) <= {1}
    assert all("\n" not in reason and reason for reason in batch.errors.values())
    assert torch.equal(batch.pixels[0], batch.pixels[2])
    assert batch.pixels[0].any()
    if batch.errors:
        assert not batch.pixels[1].any()
    assert np.array_equal(batch.index, [0, 1, 2])


KEYS = [*documented_keys(), "hydra", "hydra.run.dir", "hydra/launcher", "hydra.callbacks", "data@x", "_target_", ""]
words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
values = st.one_of(
    words,
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["null", "[1,2]", "{a:1}", "${oc.env:HOME}", "${x}", "a,b", "'q'", "fake", "folder", "true", "??"]),
)


@st.composite
def overrides(draw: st.DrawFn) -> str:
    prefix = draw(st.sampled_from(["", "", "", "+", "++", "~", "-", "--"]))
    key = draw(st.one_of(st.sampled_from(KEYS), words))
    return f"{prefix}{key}{draw(st.sampled_from(['=', '=', '=', '', '==', '.']))}{draw(values)}"


@pytest.mark.usefixtures("registered")
@bounded(250)
@given(argv=st.lists(overrides(), max_size=3), flags=st.sampled_from([[], [], ["-m"], ["--cfg", "job"]]))
@example(argv=["data=folder", "data.root=${oc.env:HOME}"], flags=[])
@example(argv=["data.size=0", "++A="], flags=[])
@example(argv=["data=[0]"], flags=[])
@example(argv=["data.size=${oc.env:HOME}"], flags=[])
@example(argv=["data.size=${0}"], flags=[])
@example(argv=["+data.root=x"], flags=[])
def test_any_line_is_a_command_or_one_line_of_refusal(
    tmp_path_factory: pytest.TempPathFactory, argv: list[str], flags: list[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        empty = tmp_path_factory.getbasetemp() / "empty"
        empty.mkdir(exist_ok=True)
        patch.chdir(empty)
        try:
            command = check_command([*flags, *argv])
        except UsageError as error:
            said = str(error)
        else:
            said = "it must run"
            assert "_target_" not in " ".join(command.words)
        assert len(said.splitlines()) == 1
        assert " must " in said or said.startswith("Hydra refuses the configuration: ")
        assert not list(Path().iterdir())
