"""The header reader against Pillow's own reading of the same bytes."""

import io
import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mgpu_ddp.preprocess import transform
from mgpu_ddp.preprocess.jpeg_header import SEGMENTS, Header, read_header

FOLDER = os.environ.get("MGPU_DDP_BAD_IMAGES")


def picture(mode: str = "RGB", size: tuple[int, int] = (37, 23)) -> Image.Image:
    coarse = Image.frombytes(mode, (5, 4), np.random.default_rng(0).bytes(20 * len(Image.new(mode, (1, 1)).getbands())))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def jpeg(mode: str = "RGB", size: tuple[int, int] = (37, 23), **options: Any) -> bytes:
    file = io.BytesIO()
    picture(mode, size).save(file, "JPEG", **options)
    return file.getvalue()


def header(data: bytes) -> Header:
    found = read_header(data)
    assert found is not None
    return found


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body


def insert(data: bytes, *segments: bytes) -> bytes:
    """Put segments right behind the start of a file."""
    return data[:2] + b"".join(segments) + data[2:]


def tiff(order: str, *entries: tuple[int, int, int, bytes], tail: bytes = b"") -> bytes:
    """A TIFF directory, as EXIF holds one."""
    big = "big" if order == ">" else "little"
    head = (b"MM\0*" if order == ">" else b"II*\0") + (8).to_bytes(4, big)
    count = len(entries).to_bytes(2, big)
    fields = (tag.to_bytes(2, big) + kind.to_bytes(2, big) + n.to_bytes(4, big) + v for tag, kind, n, v in entries)
    return head + count + b"".join(fields) + tail


def exif(content: bytes) -> bytes:
    return segment(0xE1, b"Exif\0\0" + content)


def xmp(orientation: int) -> bytes:
    return segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="%d"/>' % orientation)


def opened(data: bytes) -> Image.Image | None:
    """The image as Pillow opens it, not yet decoded; None where it does not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return Image.open(io.BytesIO(data), formats=("JPEG",))
        except Exception:
            return None


def applied_orientation(image: Image.Image) -> int | None:
    """The orientation that `upright` applies, told from four pixels; None where Pillow fails over other tags."""
    corners = np.array([[0, 1], [2, 3]], dtype=np.uint8)
    small = Image.fromarray(corners)
    small.info, small._exif = image.info, image._exif
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            turned = np.asarray(transform.upright(small)).ravel().tolist()
        except Exception:
            return None
    flat, turns = corners, {}
    for orientation, view in enumerate(
        [flat, flat[:, ::-1], flat[::-1, ::-1], flat[::-1], flat.T, flat.T[:, ::-1], flat.T[::-1, ::-1], flat.T[::-1]],
        1,
    ):
        turns[tuple(view.ravel().tolist())] = orientation
    return turns[tuple(turned)]


def assert_agrees(data: bytes) -> Header | None:
    """Our reading is that of Pillow, and Pillow decodes without complaint where it is plain."""
    found, image = read_header(data), opened(data)
    if found is None or image is None:
        # Pillow also opens files with padding or junk between segments, and refuses some with odd metadata.
        return found
    assert (found.width, found.height) == image.size
    assert found.components == len(image.getbands()) or image.mode == "CMYK"
    assert (found.frame in (2, 6, 10, 14)) == ("progressive" in image.info)
    assert applied_orientation(image) in (None, found.orientation)
    return found


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("quality", [30, 95])
def test_a_baseline_file_is_plain(subsampling: int, quality: int) -> None:
    found = assert_agrees(jpeg(subsampling=subsampling, quality=quality, comment=b"\xff\xd8\xff\xd9"))
    assert found is not None
    assert found.plain
    assert (found.width, found.height, found.components, found.precision) == (37, 23, 3, 8)
    assert (found.frame, found.adobe, found.orientation) == (0, None, 1)
    assert found.sampling == [b"\x11\x11\x11", b"\x21\x11\x11", b"\x22\x11\x11"][subsampling]


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({"mode": "L"}, True),
        ({"restart_marker_blocks": 1}, True),
        ({"optimize": True}, True),
        ({"size": (1, 1)}, True),
        ({"size": (65500, 1)}, True),
        ({"progressive": True}, False),
        ({"mode": "L", "progressive": True}, False),
        ({"mode": "CMYK"}, False),
        ({"keep_rgb": True}, False),
    ],
)
def test_what_is_plain_and_what_is_not(options: dict[str, Any], plain: bool) -> None:
    found = assert_agrees(jpeg(**options))
    assert found is not None
    assert found.plain == plain


def edited(data: bytes, marker: int, offset: int, value: int) -> bytes:
    """Change a byte of the body of a segment that occurs once."""
    at = data.index(bytes([0xFF, marker])) + 4 + offset
    return data[:at] + bytes([value]) + data[at + 1 :]


def test_each_rule_of_plain_counts() -> None:
    data = jpeg(subsampling=2)
    assert header(data).plain
    assert header(insert(data, segment(0xEE, b"Adobe\0d\0\0\0\0\1"))).plain
    assert header(data + b"\0" * 999).plain
    assert header(data + b"trailing garbage").plain
    assert header(data[:2] + b"\xff" * 9 + data[2:]).plain
    sof, sos = 0xC0, 0xDA
    for other in [
        insert(data, segment(0xEE, b"Adobe\0d\0\0\0\0\0")),  # RGB
        insert(data, segment(0xEE, b"Adobe\0d\0\0\0\0\2")),  # YCCK
        data[:-2],
        data[:-2] + b"\0" * 99,
        data.replace(b"\xff\xc0", b"\xff\xc1"),
        data.replace(b"\xff\xc0", b"\xff\xc9"),
        edited(data, sof, 0, 12),  # bits
        edited(data, sof, 6, ord("R")),
        edited(edited(data, sof, 6, ord("R")), sos, 1, ord("R")),  # not the names of YCbCr
        edited(data, sof, 7, 0x41),  # 4:1:1
        edited(data, sof, 8, 3),  # a quantisation table that is not there
        edited(data, sos, 2, 0x33),  # Huffman tables that are not there
        edited(data, sos, 1, 2),  # another component's name
        edited(data, sos, 7, 1),  # not from the first coefficient
        edited(data, sos, 8, 5),  # not to the last
        edited(edited(data, sof, 1, 255), sof, 3, 255),  # larger than Pillow opens
    ]:
        assert not header(other).plain
    for broken in [
        b"",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n" + data,
        data[:2] + b"junk" + data[2:],
        edited(edited(data, sof, 1, 0), sof, 2, 0),  # no height
        edited(data, sof, 5, 2),  # more components than it says
        insert(data, data[data.index(b"\xff\xc0") :][:19]),  # two frames
        insert(data, b"\xff\xe5\0\1"),  # a segment shorter than its own length
        insert(data, segment(0xDB, bytes(64))),  # a table that ends early
        insert(data, segment(0xDB, b"\4" + bytes(64))),  # a fifth table
        insert(data, segment(0xC4, b"\x20" + bytes(16))),  # neither DC nor AC
        insert(data, b"\xff\xd9"),
        data[:2] + b"\xff" * 2 * SEGMENTS + data[2:],
        data[: data.index(b"\xff\xda")],
    ]:
        assert read_header(broken) is None


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_pillows(orientation: int, order: str) -> None:
    big = "big" if order == ">" else "little"
    short = orientation.to_bytes(2, big)
    value = short + b"\0\0"
    entry = (0x0112, 3, 1, value)
    camera = (0x010F, 2, 5, (26).to_bytes(4, big))
    data = jpeg()
    for content in [
        exif(tiff(order, entry)),
        exif(tiff(order, entry, tail=b"\0\0\0\0")),
        exif(tiff(order, (0x0100, 3, 1, b"\1\1\0\0"), entry, tail=bytes(40))),
        exif(tiff(order, camera, entry, tail=b"Canon\0")),
        exif(tiff(order, (0x0112, 4, 1, orientation.to_bytes(4, big)))),
        exif(tiff(order, (0x0112, 1, 1, bytes([orientation, 0, 0, 0])))),
        exif(tiff(order, (0x0112, 3, 2, short + short))),
        exif(
            tiff(order, (0x0112, 5, 1, (22).to_bytes(4, big)), tail=orientation.to_bytes(4, big) + (1).to_bytes(4, big))
        ),
        exif(tiff(order, entry, (0x0112, 3, 1, (2).to_bytes(2, big) + b"\0\0"))),
        exif(b"Exif\0\0" + tiff(order, entry)),
        exif(tiff(order, entry)[:-1]),
        exif(tiff(order, (0x010F, 2, 999, (26).to_bytes(4, big)), entry)),
        exif(tiff(order, entry)[:4] + b"\xff\xff\xff\xff"),
        exif(b"nonsense"),
        exif(b""),
        exif(tiff(order, entry)[:9]) + exif(tiff(order, entry)[9:]),
        xmp(orientation),
        xmp(orientation) + xmp(9 - orientation),
        exif(tiff(order, entry)) + xmp(3),
        exif(tiff(order)) + xmp(orientation),
        exif(b"nonsense") + xmp(orientation),
        exif(b"") + xmp(orientation),
    ]:
        for bare in (data, data[:2] + data[20:]):  # with and without the JFIF segment, which bears on what Pillow reads
            assert_agrees(insert(bare, content))
    assert header(insert(data, exif(tiff(order, entry)))).orientation == orientation
    assert header(insert(data, xmp(orientation))).orientation == orientation


def test_orientations_out_of_range_are_none() -> None:
    for value in (0, 9, 255):
        for content in (exif(tiff("<", (0x0112, 3, 1, value.to_bytes(4, "little")))), xmp(value % 10)):
            found = assert_agrees(insert(jpeg(), content))
            assert found is not None
            assert found.orientation == 1 or value == 255


def test_a_thumbnail_is_not_mistaken_for_the_picture() -> None:
    thumbnail = jpeg(size=(16, 9))
    inside = insert(jpeg(), exif(tiff("<", (0x0112, 3, 1, b"\6\0\0\0"), tail=b"\0\0\0\0" + thumbnail)))
    found = assert_agrees(inside)
    assert found is not None
    assert (found.width, found.height, found.orientation, found.plain) == (37, 23, 6, True)
    # Its end marker does not make a cut file whole.
    assert not header(inside[:-2]).whole


def test_a_file_cut_anywhere_is_not_plain() -> None:
    for options in ({}, {"restart_marker_blocks": 1}, {"mode": "L"}, {"comment": b"\xff\xd9 not the end"}):
        data = jpeg(**options)
        for length in range(len(data)):
            found = assert_agrees(data[:length])
            assert found is None or not found.plain
            assert read_header(memoryview(data)[:length]) == found
        assert header(data).plain


def test_flipped_bits_are_seen_as_pillow_sees_them() -> None:
    random = np.random.default_rng(5)
    camera = (0x010F, 2, 5, (26).to_bytes(4, "little"))
    content = exif(tiff("<", camera, (0x0112, 3, 1, b"\6\0\0\0"), tail=bytes(4) + b"Canon\0"))
    files = [jpeg(), jpeg("L"), jpeg(progressive=True), insert(jpeg(), content), insert(jpeg(), content, xmp(3))]
    plain = decoded = 0
    for i in range(2000):
        data = bytearray(files[i % len(files)])
        # Mostly in the header, where they matter.
        for at in random.integers(0, 750 if i % 4 else len(data), random.integers(1, 4)):
            data[at % len(data)] ^= 1 << random.integers(0, 8)
        found = assert_agrees(bytes(data))
        if found is not None and found.plain:
            plain += 1
            try:
                transform.decode(bytes(data))
                decoded += 1
            except Exception as error:
                print(i, error)
    print(f"{plain} of 2000 are plain, {decoded} of them decode")
    assert plain > 300
    assert decoded > 0.95 * plain


def test_garbage_ends_soon() -> None:
    random = np.random.default_rng(6)
    for i in range(300):
        read_header(b"\xff\xd8\xff" + random.bytes(i))
    started = time.perf_counter()
    for data in (b"\xff\xd8" + b"\xff" * 10**7, b"\xff\xd8" + b"\xff\xe0\0\2" * 10**6, jpeg()[:-2] + bytes(10**8)):
        found = read_header(data)
        assert found is None or not found.plain
    assert time.perf_counter() - started < 1


@pytest.mark.skipif(FOLDER is None, reason="MGPU_DDP_BAD_IMAGES names no folder of odd images")
def test_odd_files_are_seen_as_pillow_sees_them() -> None:
    plain = refused = 0
    for path in sorted(Path(str(FOLDER)).rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            found = assert_agrees(data)
            if found is not None and found.plain:
                plain += 1
                try:
                    transform.decode(data)
                except Exception as error:
                    refused += 1
                    print(f"{path}: plain, but {error}")
    print(f"{plain} plain files, of which Pillow refuses {refused}")
