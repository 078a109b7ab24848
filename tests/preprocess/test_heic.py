"""HEIC: upright pixels, one row for what is broken, and a line that says what to install."""

import io
import os
import random
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mgpu_ddp.preprocess import heic
from mgpu_ddp.preprocess.transform import decode
from tests.support.heics import PLAIN, QUARTERS, ROTATED


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    """The middle of each quarter, row by row."""
    pixels = np.asarray(image)
    height, width, _ = pixels.shape
    return [tuple(pixels[y, x].tolist()) for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]


def test_heic_is_decoded_upright() -> None:
    top_left, top_right, bottom_left, bottom_right = QUARTERS
    for data, size, wanted in (
        (PLAIN, (64, 48), QUARTERS),
        (ROTATED, (48, 64), (bottom_left, top_left, bottom_right, top_right)),
    ):
        image = decode(data)
        assert (image.mode, image.size) == ("RGB", size)
        assert np.abs(np.array(corners(image)) - np.array(wanted)).max() <= 4


def test_avif_is_decoded_upright_and_is_no_heic() -> None:
    stored, data = Image.new("RGB", (40, 30), QUARTERS[0]), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(data, "AVIF", exif=exif)
    assert not heic.is_heic(data.getvalue())
    assert decode(data.getvalue()).size == (30, 40)
    assert not heic.is_heic(b"\0\0\0\x18ftypisom\0\0\0\0isommp42")
    # An AVIF may call itself a HEIF of no codec first.
    assert not heic.is_heic(data.getvalue().replace(b"ftypavif", b"ftypmif1"))
    assert heic.is_heic(PLAIN)


def test_broken_heics_are_errors_and_crash_nothing() -> None:
    """A few of these bring pi-heif 1.4 down."""
    chance, told = random.Random(1), set()
    for number in range(120):
        data = bytearray(chance.choice((PLAIN, ROTATED)))
        if number % 3:
            for _ in range(4):
                data[chance.randrange(16, 400)] = chance.randrange(256)
        else:
            del data[chance.randrange(24, len(data)) :]
        try:
            decode(bytes(data))
        except (OSError, Image.DecompressionBombError) as error:
            told.add(str(error))
    assert "broken HEIC" in told


def crash() -> Image.Image:
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def hang() -> Image.Image:
    # What interrupts the parent, once the child is there.
    os.kill(os.getppid(), signal.SIGUSR1)
    signal.pause()
    raise AssertionError


def processes() -> list[str]:
    """The children of this thread, zombies among them."""
    return Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()


def test_a_decoder_that_crashes_or_never_ends_costs_one_image() -> None:
    with pytest.raises(OSError, match=r"broken HEIC: its decoder crashed \(SIGSEGV\)"):
        heic.decode_apart(crash)

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before, others = signal.signal(signal.SIGUSR1, interrupt), processes()
    try:
        with pytest.raises(KeyboardInterrupt):
            heic.decode_apart(hang)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert processes() == others


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 // 2 - 1)
    with pytest.raises(Image.DecompressionBombError, match="3072 pixels"):
        decode(PLAIN)


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    monkeypatch.delitem(Image.OPEN, heic.FORMAT, raising=False)
    assert not heic.is_installed()
    with pytest.raises(ImportError, match=r"HEIC needs the package pi-heif: pip install 'mgpu-ddp\[heic\]'"):
        decode(PLAIN)
