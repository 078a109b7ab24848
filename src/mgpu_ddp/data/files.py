"""Images as files: a folder of them, or a list that names them."""

import errno
import logging
import os
import stat
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from mgpu_ddp.config.checks import PROTOCOLS, protocol_of, require
from mgpu_ddp.config.schema import FolderConfig, ListConfig
from mgpu_ddp.data import listing, object_store
from mgpu_ddp.data.encoded import ImageSamples
from mgpu_ddp.data.listing import Listing, is_image
from mgpu_ddp.errors import UsageError

log = logging.getLogger("mgpu_ddp")

NO_NAME = "\x01"
"""Between the columns of a text that has one: no sane path holds it."""
BLANK = r"^\s*$"
NO_LISTS = (".tsv", ".json", ".jsonl", ".arrow", ".feather", ".npy", ".tar", ".gz", ".bz2", ".xz", ".zst", ".zip")
"""Suffixes of what would be read as one path a line, and is not."""


class FileSamples(ImageSamples):
    """Image files, each by its path or URL relative to a root."""

    def __init__(self, root: str, files: Listing) -> None:
        is_far = protocol_of(root) or (len(files) and protocol_of(os.fsdecode(files.path(0))))
        super().__init__(files, self._begin if is_far else None)
        self._root = os.fsencode(root)

    def _begin(self, index: int) -> Future[bytes]:
        return object_store.begin(object_store.join(os.fsdecode(self._root), os.fsdecode(self.files.path(index))))

    def fetch(self, index: int) -> bytes:
        # What is neither a file nor a folder may never end, or never begin: it is opened without waiting, and left.
        file = os.open(os.path.join(self._root, self.files.path(index)), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(file, "rb", buffering=0) as opened:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            return opened.read()


def list_folder(data: FolderConfig, known: Listing | None, *, may_grow: bool) -> Listing:
    """List a folder; what is known keeps its index, and new images are appended.

    Raises:
        UsageError: the folder is missing, unreadable or holds no image.
    """
    if known is not None and not may_grow:
        return known
    paths = _find(data)
    if known is not None:
        return known.grown(paths)
    if not paths:
        kinds = ", ".join(e.decode().lstrip(".") for e in listing.EXTENSIONS)
        raise UsageError(f"data.root must hold at least one image ({kinds}), got {data.root!r}. Name another folder.")
    files = Listing.build(paths)
    names = [listing.readable(name) for name in files.classes()]
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    labels = f"labels from {len(names):,} class folders ({shown})"
    why_not = "no labels: not every image lies in one level of class folders"
    log.info("%s images, %s", f"{len(paths):,}", labels if names else why_not)
    return files


def _find(data: FolderConfig) -> list[bytes]:
    if not protocol_of(data.root):
        return find_images(data.root, follow_outside=data.follow_outside)
    return sorted(name for name in map(os.fsencode, object_store.find(data.root)) if listing.is_image(name))


def read_list(data: ListConfig) -> Listing:
    """Read the file that names the images.

    Raises:
        UsageError: it is missing, cannot be read or lacks what it needs.
    """
    import pyarrow as pa
    from pyarrow import compute

    suffix = Path(data.path).suffix.lower()
    rule = "a .csv or .parquet with a column path, or a text of one path a line"
    require(suffix not in NO_LISTS, "data.path", rule, data.path, "Convert it.")
    read = {".csv": _read_csv, ".parquet": _read_parquet}.get(suffix, _read_text)
    try:
        table = read(data.path)
    except (OSError, pa.ArrowException) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(
            f"data.path must be a readable list, got {data.path!r} ({' '.join(text.split())}). Mend it."
        ) from None
    if "path" not in table.column_names:
        found = ", ".join(table.column_names)
        remedy = "Separate columns by commas." if "\t" in found or ";" in found else "Rename one."
        raise UsageError(f"data.path must have a column path, got {data.path!r} with {found!r}. {remedy}")
    if not table.num_rows:
        raise UsageError(f"data.path must name at least one image, got {data.path!r}. Name another list.")
    try:
        paths = table["path"].combine_chunks().cast(pa.large_binary())
    except pa.ArrowException:
        kind = table["path"].type
        raise UsageError(
            f"data.path must have text in its column path, got {kind} in {data.path!r}. Mend it."
        ) from None
    without = paths.null_count + (compute.sum(compute.match_substring_regex(paths, BLANK)).as_py() or 0)
    if without:
        raise UsageError(f"data.path must have a path in every row, got {without} rows without. Mend it.")
    if not protocol_of(data.root or ""):
        far = compute.sum(compute.match_substring_regex(paths, f"^({'|'.join(PROTOCOLS)})://"))
        rule = "URLs in all rows or in none, unless data.root is one"
        require(far.as_py() in (0, len(paths)), "data.path", rule, f"{far} of {len(paths)} rows", "Split the list.")
    labels = table["label"] if "label" in table.column_names else pa.nulls(len(paths), pa.int32())
    log.info(
        "%s images, %s", f"{len(paths):,}", "labels from the list" if "label" in table.column_names else "no labels"
    )
    return Listing.of(paths, listing.as_labels(labels, f"column label of data.path={data.path!r}"))


def _open(path: str) -> Any:
    import pyarrow as pa

    # Names need not be UTF-8.
    return pa.PythonFile(object_store.open_file(path), mode="r") if protocol_of(path) else pa.OSFile(os.fsencode(path))


def _read_text(path: str) -> Any:
    from pyarrow import compute, csv

    # A path may hold commas, quotes and bytes that are not UTF-8.
    lines = csv.read_csv(
        _open(path),
        read_options=csv.ReadOptions(column_names=["path"], use_threads=False),
        parse_options=csv.ParseOptions(delimiter=NO_NAME, quote_char=False),
        convert_options=_as_bytes({"path": "path"}),
    )
    return lines.filter(compute.invert(compute.match_substring_regex(lines["path"], BLANK)))


def _read_csv(path: str) -> Any:
    from pyarrow import csv

    read, parse = csv.ReadOptions(use_threads=False), csv.ParseOptions(newlines_in_values=True)
    with csv.open_csv(_open(path), read, parse) as reader:
        names = _columns(reader.schema.names)
        if "path" not in names:
            return reader.schema.empty_table()
    return csv.read_csv(_open(path), read, parse, _as_bytes(names)).rename_columns(list(names))


def _columns(given: list[str]) -> dict[str, str]:
    """What the columns path and label are called, blanks included, as far as they are there."""
    found = [name for name in given if name.strip() in ("path", "label")]
    names = {name.strip(): name for name in found}
    require(len(names) == len(found), "data.path", "a list with one column path and one label", given, "Rename some.")
    near = [name for name in given if name.strip(" \t\"'").lower() in ("label", "labels")]
    if "label" not in names and near:
        log.warning("data.path: column %r is not taken for labels: call it label", near[0])
    return names


def _as_bytes(names: dict[str, str]) -> Any:
    import pyarrow as pa
    from pyarrow import csv

    return csv.ConvertOptions(column_types={names["path"]: pa.large_binary()}, include_columns=list(names.values()))


def _read_parquet(path: str) -> Any:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(_open(path), pre_buffer=False)
    names = _columns(table.schema_arrow.names)
    if "path" not in names:
        return table.schema_arrow.empty_table()
    read = table.read(columns=list(names.values()), use_threads=False)
    return read.select(list(names.values())).rename_columns(list(names))


def find_images(root: str, *, follow_outside: bool) -> list[bytes]:
    """List every image file below a folder: sorted bytes relative to it.

    Real folders come before links to them, so that each is listed once and under its own name. Only regular
    files count: a FIFO or a device is never opened.

    Raises:
        UsageError: the root, or a folder below it, is missing or unreadable.
    """
    top = os.fsencode(os.path.abspath(root))
    inside = os.path.join(os.path.realpath(top), b"")
    found: list[bytes] = []
    seen: set[tuple[int, int]] = set()
    folders = [b""]
    while folders:
        links: list[bytes] = []
        while folders:
            _read_folder(top, folders.pop(), seen, folders, links, found)
        for link in sorted(links, reverse=True):
            path = os.path.join(top, link)
            if not os.path.exists(path) or not (follow_outside or os.path.realpath(path).startswith(inside)):
                continue
            mode = os.stat(path).st_mode
            if stat.S_ISDIR(mode):
                folders.append(link)
            elif stat.S_ISREG(mode) and is_image(link):
                found.append(link)
    return sorted(found)


def _read_folder(
    top: bytes,
    folder: bytes,
    seen: set[tuple[int, int]],
    folders: list[bytes],
    links: list[bytes],
    found: list[bytes],
) -> None:
    path = os.path.join(top, folder) if folder else top
    try:
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(path) as entries:
            for entry in entries:
                relative = os.path.join(folder, entry.name)
                if entry.is_symlink():
                    links.append(relative)
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(relative)
                elif is_image(entry.name) and entry.is_file(follow_symlinks=False):
                    found.append(relative)
    except OSError as error:
        shown = os.fsdecode(path)
        raise UsageError(
            f"data.root must be a readable folder, got {shown!r} ({error.strerror}). Name another."
        ) from None
