"""Reads a JPEG's header without decoding it, to tell which files a GPU may decode.

The GPU's decoder fails a whole batch for one file that it cannot read, and may decode half a file without an error. So
it gets only plain files, and Pillow judges the rest. Where this reader and Pillow could see a file differently
(padding between segments, odd metadata), it returns None or asks Pillow.

Source: ITU-T T.81 annex B for segments and their fields; libjpeg's jdapimin.c for the rule that tells colours.
"""

import re
import struct
import warnings
from dataclasses import dataclass

from PIL import Image

from mgpu_ddp.preprocess.transform import EXIF_ORIENTATION, MAX_RESIZED_PIXELS

SEGMENTS = 4096
"""The most that are read; a profile or a preview that is split over many stays far below."""
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
SKIPPED = frozenset(range(0xE0, 0xF0)) | {0xCC, 0xDD, 0xFE}
DHT, SOS, DQT, APP1, APP14 = 0xC4, 0xDA, 0xDB, 0xE1, 0xEE
EOI = b"\xff\xd9"
CHROMA = {b"\x11": (0, 0), b"\x11\x11\x11": (1, 1), b"\x21\x11\x11": (1, 2), b"\x22\x11\x11": (2, 2)}
"""Pixels, (down, across), that share a sample of chroma, by `Header.sampling`: in grey, 4:4:4, 4:2:2 and 4:2:0."""
EXIF, XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
"""Bytes of a value of each type of TIFF entry that Pillow knows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """A JPEG's header, up to its first scan.

    `width` and `height` are in pixels, as stored, and `orientation` (EXIF's, 1 to 8) is the one Pillow would apply.
    `frame` is the n of its SOFn: 0 baseline, 1 extended, 2 progressive, above that lossless or arithmetic. `names`
    and `sampling` hold one byte per component, the latter horizontal << 4 | vertical. `adobe` is the transform of an
    Adobe segment. `one_scan`: the first scan holds all components, entire, and all tables it needs are there. `whole`:
    an end marker follows the start of the scan; Pillow ignores what comes after it.
    """

    width: int
    height: int
    precision: int
    frame: int
    names: bytes
    sampling: bytes
    adobe: int | None
    orientation: int
    one_scan: bool
    whole: bool

    @property
    def components(self) -> int:
        return len(self.sampling)

    @property
    def upright(self) -> tuple[int, int]:
        """(width, height) of the upright image."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)

    @property
    def chroma(self) -> tuple[int, int]:
        """(down, across): pixels that share a sample of chroma in a plain file; none do in a grey one."""
        return CHROMA[self.sampling]

    @property
    def plain(self) -> bool:
        """A GPU may decode the file: it is whole, baseline, of 8 bits, grey or YCbCr, of common sampling.

        Images so large that Pillow would warn of them or refuse them are left to Pillow.
        """
        return (
            self.frame == 0
            and self.precision == 8
            and self.whole
            and self.one_scan
            and self.sampling in CHROMA
            and (self.components == 1 or (self.names == b"\1\2\3" and self.adobe in (None, 1)))
            and self.width * self.height <= MAX_RESIZED_PIXELS
        )


def read_header(data: bytes | memoryview) -> Header | None:
    """Read a file's header up to its first scan; None where it is no JPEG, or its header is not intact."""
    try:
        return _read(bytes(data))
    except (IndexError, struct.error):
        return None


def _read(data: bytes) -> Header | None:
    # Reading past the end raises IndexError.
    frame = adobe = None
    exif = xmp = b""
    tables: set[int] = set()
    if data[:3] != b"\xff\xd8\xff":
        return None
    at = 2
    for _ in range(SEGMENTS):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        start, end = at + 4, at + 2 + (data[at + 2] << 8 | data[at + 3])
        if not start <= end <= len(data):
            return None
        if marker == SOS:
            break
        if marker in FRAMES:
            if frame is not None or end - start != 6 + 3 * data[start + 5]:
                return None
            frame = marker, data[start:end]
        elif marker in (DHT, DQT):
            found = _tables(data, start, end, marker)
            if found is None:
                return None
            tables |= found
        elif marker == APP1:
            if data.startswith(EXIF, start, end):
                exif += data[start + len(EXIF) : end]
            elif data.startswith(XMP, start, end):
                xmp = data[start + len(XMP) : end]
        elif marker == APP14:
            if end - start >= 12 and data.startswith(b"Adobe", start):
                adobe = data[start + 11]
        elif marker not in SKIPPED:
            return None
        at = end
    else:
        return None
    if frame is None:
        return None
    kind, body = frame
    precision, height, width = struct.unpack_from(">BHH", body)
    if height == 0 or width == 0:
        return None
    names = body[6::3]
    return Header(
        width=width,
        height=height,
        precision=precision,
        frame=kind & 15,
        names=names,
        sampling=body[7::3],
        adobe=adobe,
        orientation=_orientation(exif, xmp),
        one_scan=_is_entire(data[start:end], names, tables) and tables.issuperset(body[8::3]),
        whole=data.endswith(EOI) or data.rfind(EOI, end) >= 0,
    )


def _tables(data: bytes, at: int, end: int, marker: int) -> set[int] | None:
    """The tables that a segment defines; None where it is not made of whole ones.

    Quantisation tables are 0 to 3 (those of 16 bits, which no baseline file may have, are higher), Huffman tables
    0x40 to 0x43 (DC) and 0x50 to 0x53 (AC).
    """
    found = set()
    while at < end:
        table = data[at]
        if table & 15 > 3 or table >> 4 > 1:
            return None
        if marker == DQT:
            at += 65 if table < 16 else 129
            found.add(table)
        else:
            at += 17 + sum(data[at + 1 : at + 17])
            found.add(0x40 + table)
    return found if at == end else None


def _is_entire(scan: bytes, names: bytes, tables: set[int]) -> bool:
    """Check that a scan holds all components, with all coefficients, and that its tables exist."""
    count = len(names)
    if len(scan) != 4 + 2 * count or scan[0] != count or scan[1 : 1 + 2 * count : 2] != names:
        return False
    selected = scan[2 : 2 + 2 * count : 2]
    return scan[-3:] == b"\0\x3f\0" and all(0x40 + (s >> 4) in tables and 0x50 + (s & 15) in tables for s in selected)


def _orientation(exif: bytes, xmp: bytes) -> int:
    """The orientation that Pillow finds: EXIF's, or that of XMP where EXIF says nothing."""
    value = _exif_orientation(exif) if exif else None
    if value is None and xmp and (match := re.search(rb'tiff:Orientation(="|>)([0-9])', xmp)):
        value = int(match[2])
    return value if value is not None and 1 <= value <= 8 else 1


def _exif_orientation(exif: bytes) -> int | None:
    """The orientation in a TIFF directory; a malformed directory is left to Pillow, which is slower."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return _pillows_orientation(exif)
    try:
        (at,) = struct.unpack_from(order + "L", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, at)
    except struct.error:
        return _pillows_orientation(exif)
    entries = exif[at + 2 : at + 2 + 12 * count]
    if len(entries) != 12 * count:
        return _pillows_orientation(exif)
    value = None
    for tag, kind, number, content in struct.iter_unpack(order + "HHLL", entries):
        size = number * TYPE_BYTES.get(kind, 0)
        if size > 4 and content + size > len(exif):
            return _pillows_orientation(exif)
        if tag == EXIF_ORIENTATION:
            if value is not None or kind != 3 or number != 1:
                return _pillows_orientation(exif)
            value = content & 0xFFFF if order == "<" else content >> 16
    return value


def _pillows_orientation(exif: bytes) -> int | None:
    directory = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            directory.load(EXIF + exif)
            value = directory.get(EXIF_ORIENTATION)
        return None if value is None else int(value) if value in range(1, 9) else 0
    except Exception:
        # As in `transform.upright`: unreadable metadata says nothing, and XMP is not asked either.
        return 1
