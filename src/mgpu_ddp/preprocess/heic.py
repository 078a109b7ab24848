"""HEIC, the format of phones: recognised by its first bytes, decoded by pi-heif in a process of its own.

Broken files crash pi-heif, which is native code (docs/reliability.md), and a bad image costs its own row alone.
"""

import faulthandler
import importlib.util
import json
import os
import resource
import signal
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

from PIL import Image, UnidentifiedImageError

EXTENSIONS = ("heic", "heif", "hif")
INSTALL = "pip install 'mgpu-ddp[heic]'"
FORMAT = "HEIF"
"""Pillow's name of it, once it is registered."""
BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
AVIF_BRANDS = {b"avif", b"avis"}
SIZE = struct.Struct("II")
CPU_S = 300
"""No image takes as long: what does will never end."""
ROOM_BYTES, PIXEL_BYTES = 256 << 20, 16
"""Memory that decoding takes: planes, RGB, Pillow's copy of it with four bytes a pixel, and the answer."""


def is_heic(data: bytes) -> bool:
    """True for a HEIF file that is no AVIF. Source: ISO/IEC 14496-12, the box ftyp."""
    if data[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(data[:4], "big"), 1024)
    brands = {data[8:12], *(data[place : place + 4] for place in range(16, end, 4))}
    return bool(brands & BRANDS) and not brands & AVIF_BRANDS


def is_installed() -> bool:
    return importlib.util.find_spec("pi_heif") is not None


def register() -> None:
    """Teach Pillow the format.

    Raises:
        ImportError: names the package that is missing.
    """
    if FORMAT in Image.OPEN:
        return
    try:
        import pi_heif
    except ImportError:
        raise ImportError(f"HEIC needs the package pi-heif: {INSTALL}") from None
    pi_heif.register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)


def decode_apart(decode: Callable[[], Image.Image]) -> Image.Image:
    """Call a function that returns an RGB image in a child process.

    Raises:
        OSError: it raised, or its process crashed.
        DecompressionBombError: the image is larger than Pillow's limit.
    """
    read_end, write_end = os.pipe()
    with warnings.catch_warnings():
        # Other threads of this process may hold locks that the child will not ask for.
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        _answer(decode, write_end)
    os.close(write_end)
    try:
        with open(read_end, "rb") as answer:
            kind, head = answer.read(1), answer.read(SIZE.size)
            size = SIZE.unpack(head) if kind == b"I" else (0, 0)
            pixels = bytearray(3 * size[0] * size[1])
            answer.readinto(pixels)
            text = head + answer.read()
    except BaseException:
        # The sample took too long, or this process is to end.
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if kind == b"E":
        name, reason = json.loads(text)
        raise (Image.DecompressionBombError if name == "DecompressionBombError" else OSError)(reason)
    if code != 0:
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise OSError(f"broken HEIC: its decoder crashed ({how})")
    return Image.frombytes("RGB", size, pixels)


def _answer(decode: Callable[[], Image.Image], write_end: int) -> None:
    """Write the image or the error and end this process, whatever happens."""
    try:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
        resource.setrlimit(resource.RLIMIT_AS, (_most_bytes(), _most_bytes()))
        # The decoder says there what it does not like.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with open(write_end, "wb") as answer:
            try:
                image = decode()
                pixels = image.tobytes()
            except Exception as error:
                answer.write(b"E" + json.dumps([type(error).__name__, _reason(error)]).encode())
            else:
                answer.write(b"I" + SIZE.pack(*image.size))
                answer.write(pixels)
    finally:
        os._exit(0)


def _most_bytes() -> int:
    """The address space of this process with room for one image of the size that Pillow lets pass."""
    pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    return pages * resource.getpagesize() + ROOM_BYTES + PIXEL_BYTES * 2 * (Image.MAX_IMAGE_PIXELS or 0)


def _reason(error: Exception) -> str:
    # Pillow keeps to itself why a file of a known format cannot be opened.
    return "broken HEIC" if isinstance(error, UnidentifiedImageError) else str(error)
