"""Lists that name the images: a text of one path a line, a CSV or a Parquet file."""

import csv as standard_csv
import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mgpu_ddp.config.checks import PROTOCOLS, protocol_of, require
from mgpu_ddp.config.schema import ListConfig
from mgpu_ddp.data import object_store
from mgpu_ddp.data.boxes import WITHOUT, as_lists, read_boxes, require_boxes
from mgpu_ddp.data.carried import find_columns
from mgpu_ddp.data.content import check_of, content_of
from mgpu_ddp.data.image_names import ImageNames, describe, log_left_out, most_common
from mgpu_ddp.data.input_file import require_input
from mgpu_ddp.data.labels import as_labels, as_names, is_text, log_labels, number_names
from mgpu_ddp.data.listing import CARRIED, Listing, readable
from mgpu_ddp.errors import UsageError, cause_of

log = logging.getLogger("mgpu_ddp")

NO_DELIMITER = "\x01"
"""Separates the columns of a text that has one: no sane path holds it."""
BOX = "box "
"""Begins the names that the columns of boxes have here."""
BLANK = r"^\s*$"
CELLS = {
    "int64": r"^(0|-?[1-9][0-9]{0,17})$",
    "float64": r"^-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,17})?([eE][+-]?[0-9]{1,2})?$",
    "bool": r"^(true|false|True|False|TRUE|FALSE)$",
}
"""Types of a CSV's columns, and how each of their cells reads: as a number 007 would lose digits, so it is text."""
BLOCK_BYTES = 64 << 20
"""No row of a CSV is longer."""
HEAD_BYTES = 4096
"""The beginning of a text, which shows its encoding."""
NO_LISTS = (".tsv", ".json", ".jsonl", ".arrow", ".feather", ".npy", ".tar", ".gz", ".bz2", ".xz", ".zst", ".zip")
"""Suffixes of files that would be read as one path a line, and are not."""


def read_list(data: ListConfig, known: Listing | None = None) -> Listing:
    """Read the file that names the images; `known` is what an earlier start has made of it.

    Raises:
        UsageError: it is missing, cannot be read or lacks what it needs.
    """
    import pyarrow as pa

    table = _read_table(data)
    if "path" not in table.column_names:
        found = ", ".join(table.column_names)
        remedy = "Separate columns by commas." if "\t" in found or ";" in found else "Rename one."
        raise UsageError(f"data.path={data.path!r} has no column path, but {found!r}. {remedy}")
    if not table.num_rows:
        raise UsageError(f"data.path={data.path!r} names no image. Name another list.")
    table, types = _with_carried(table, data, known)
    if data.box_column is not None:
        table = _with_boxes(table, data)
    table, left_out = _choose(table, data)
    paths = _to_paths(table["path"], data)
    labels = table["label"] if "label" in table.column_names else pa.nulls(len(paths), pa.int32())
    what, names = f"column label of data.path={data.path!r}", None
    if is_text(labels.type):
        before = known.label_names if known is not None else None
        labels, names = number_names(as_names(labels), before or (), what)
    else:
        labels = as_labels(labels, what)
    log_labels(len(paths), len(paths) - labels.null_count, names)
    kept = {CARRIED + name: pa.concat_arrays(table[CARRIED + name].chunks) for name in types.names}
    content = {**_content_of(paths, data), **kept}
    if data.box_column is not None:
        rows, boxes = _box_rows(table["box"], data, left_out)
        paths, labels = paths.take(rows), labels.take(rows)
        content = {name: column.take(rows) for name, column in content.items()} | {"box": boxes}
    files = Listing.of(paths, labels, label_names=names, carried=types, **content)
    files.left_out = left_out
    return files if known is None else files.after(known)


def _with_boxes(table: Any, data: ListConfig) -> Any:
    """The table with a column box, of lists of boxes, in the place of those that were read."""
    names = [name for name in table.column_names if name.startswith(BOX)]
    counts, boxes = read_boxes([table[name] for name in names], lambda row: _place(data.path, row))
    return table.drop_columns(names).append_column("box", as_lists(counts, boxes))


def _box_rows(lists: Any, data: ListConfig, left_out: dict[str, int]) -> tuple[Any, Any]:
    """The row of the list of each box, and the boxes; images that have none are counted as left out."""
    from pyarrow import compute

    lists = lists.combine_chunks()
    rows, boxes = compute.list_parent_indices(lists), lists.flatten()
    require_boxes(len(boxes))
    if without := compute.sum(compute.equal(compute.list_value_length(lists), 0)).as_py():
        left_out[WITHOUT] = without
        log_left_out({WITHOUT: without})
    log.info("%s boxes", f"{len(boxes):,}")
    return rows, boxes


def _place(path: str, row: int) -> str:
    """Name the place of a row of the list: its line, where it is a text."""
    if Path(path).suffix.lower() != ".csv":
        return f"row {row} of {path!r}"
    number, line = -1, 1
    with _open(path) as file:
        lines = standard_csv.reader(io.TextIOWrapper(file, "utf-8", "surrogateescape", newline=""))
        for record in lines:
            # An empty line is no row, and the first row is that of names.
            number += bool(record)
            if number > row:
                break
            line = lines.line_num + 1
    return f"line {line} of {path!r}"


def _choose(table: Any, data: ListConfig) -> tuple[Any, dict[str, int]]:
    """The rows with the extensions that are asked for, and how many others there are, by kind."""
    if not data.extensions:
        return table, {}
    names = ImageNames(data.extensions)
    paths = [path.encode() if isinstance(path, str) else path for path in table["path"].to_pylist()]
    chosen = table.filter([names.take(os.path.basename(path)) for path in paths])
    left_out = most_common(names.left_out)
    log_left_out(left_out)
    rule = f"those of files in the list ({describe(left_out)})"
    require(chosen.num_rows > 0, "data.extensions", rule, ", ".join(data.extensions), "Leave it out for all files.")
    return chosen, left_out


def _content_of(paths: Any, data: ListConfig) -> dict[str, Any]:
    first = os.fsdecode(paths[0].as_py())
    is_remote = bool(protocol_of(data.root or "") or protocol_of(first))
    fits = not is_remote or data.check in ("auto", "name")
    require(fits, "data.check", "name or auto for URLs", data.check, "Leave it out.")
    check = check_of(data.check, is_remote=is_remote)
    # A file that is named twice, as four columns of boxes do, is looked at once.
    files = paths.dictionary_encode()
    content = content_of(str(data.root), files.dictionary.to_pylist(), check) if check != "name" else {}
    return {name: column.take(files.indices) for name, column in content.items()}


def _read_table(data: ListConfig) -> Any:
    """The columns path and label, as far as they are there, and then those of boxes."""
    import pyarrow as pa

    path, boxes = data.path, data.box_column or []
    suffix = Path(path).suffix.lower()
    rule = "a .csv or .parquet with a column path, or a text of one path a line"
    require(suffix not in NO_LISTS, "data.path", rule, path, "Convert it.")
    read = {".csv": _read_csv, ".parquet": _read_parquet}.get(suffix, _read_text)
    try:
        return read(path, boxes)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise UsageError(
            f"data.path={path!r} cannot be read ({cause_of(error)}). Fix it, or name another list."
        ) from None


def _to_paths(column: Any, data: ListConfig) -> Any:
    """The column path as bytes, one in every row, all URLs or none."""
    import pyarrow as pa
    from pyarrow import compute

    try:
        paths = column.combine_chunks().cast(pa.large_binary())
    except pa.ArrowException:
        raise UsageError(
            f"data.path={data.path!r} has {column.type} in its column path, not text. Fix the column."
        ) from None
    without = paths.null_count + (compute.sum(compute.match_substring_regex(paths, BLANK)).as_py() or 0)
    if without:
        raise UsageError(f"data.path={data.path!r} has {without} rows without a path. Delete or complete them.")
    if not protocol_of(data.root or ""):
        urls = compute.sum(compute.match_substring_regex(paths, f"^({'|'.join(PROTOCOLS)})://"))
        rule = "URLs in all rows or in none, unless data.root is one"
        require(urls.as_py() in (0, len(paths)), "data.path", rule, f"{urls} of {len(paths)} rows", "Split the list.")
    for protocol in PROTOCOLS:
        # Before anything is claimed, and not in a loader worker.
        if (
            protocol == protocol_of(data.root or "")
            or compute.any(compute.starts_with(paths, f"{protocol}://")).as_py()
        ):
            object_store.check_package(protocol)
    return paths


def _open(path: str) -> Any:
    import pyarrow as pa

    if protocol_of(path):
        return pa.PythonFile(object_store.open_file(path), mode="r")
    require_input(path)
    # Names need not be UTF-8.
    return pa.OSFile(os.fsencode(path))


def _open_text(path: str) -> Any:
    """Open a text in UTF-8, or in any other encoding that has no zero bytes."""
    with _open(path) as file:
        is_text = b"\0" not in file.read(HEAD_BYTES)
    require(is_text, "data.path", "a text in UTF-8", f"{path} with zero bytes, as UTF-16 has them", "Convert it.")
    return _open(path)


def _read_text(path: str, boxes: Sequence[str]) -> Any:
    from pyarrow import compute, csv

    require(not boxes, "data.box_column", "null for a text of one path a line", [*boxes], "Make the list a .csv.")
    # A path may hold commas, quotes and bytes that are not UTF-8.
    lines = csv.read_csv(
        _open_text(path),
        read_options=csv.ReadOptions(column_names=["path"], use_threads=False),
        parse_options=csv.ParseOptions(delimiter=NO_DELIMITER, quote_char=False),
        convert_options=_as_bytes({"path": "path"}),
    )
    return lines.filter(compute.invert(compute.match_substring_regex(lines["path"], BLANK)))


def _read_csv(path: str, boxes: Sequence[str]) -> Any:
    from pyarrow import csv

    read, parse = csv.ReadOptions(use_threads=False), csv.ParseOptions(newlines_in_values=True)
    with csv.open_csv(_open_text(path), read, parse) as reader:
        names = _columns(reader.schema.names, boxes)
        if "path" not in names:
            return reader.schema.empty_table()
    return csv.read_csv(_open(path), read, parse, _as_bytes(names)).rename_columns(list(names))


def _read_parquet(path: str, boxes: Sequence[str]) -> Any:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(_open(path), pre_buffer=False)
    names = _columns(table.schema_arrow.names, boxes)
    if "path" not in names:
        return table.schema_arrow.empty_table()
    read = table.read(columns=list(names.values()), use_threads=False)
    return read.select(list(names.values())).rename_columns(list(names))


def _with_carried(table: Any, data: ListConfig, known: Listing | None) -> tuple[Any, Any]:
    """The table with the columns that `data.carry` names, and the schema of these.

    Their types have room for all rows in one array.
    """
    import pyarrow as pa

    if not data.carry:
        return table, pa.schema([])
    suffix = Path(data.path).suffix.lower()
    rule = "left out for a text of one path a line"
    require(suffix in (".csv", ".parquet"), "data.carry", rule, list(data.carry), "Give a .csv with a column path.")
    try:
        columns = (_carried_of_csv if suffix == ".csv" else _carried_of_parquet)(data)
    except (OSError, pa.ArrowException) as error:
        raise UsageError(
            f"data.carry: {data.path!r} cannot be read ({cause_of(error)}). Fix it, or leave columns out."
        ) from None
    if suffix == ".csv":
        before = known.carried if known is not None else pa.schema([])
        # Of what was text once new cells are text as well.
        texts = {field.name for field in before if is_text(field.type)}
        columns = [
            column if name in texts else _typed(column) for name, column in zip(data.carry, columns, strict=True)
        ]
    for name, column in zip(data.carry, columns, strict=True):
        table = table.append_column(CARRIED + name, column)
    return table, pa.table(columns, names=list(data.carry)).schema


def _carried_of_csv(data: ListConfig) -> list[Any]:
    """Columns as text, null where a cell is empty."""
    import pyarrow as pa
    from pyarrow import csv

    read = csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES)
    parse = csv.ParseOptions(newlines_in_values=True)
    with csv.open_csv(_open(data.path), read, parse) as reader:
        names = find_columns(reader.schema.names, data.carry, f"data.path={data.path!r}")
    convert = csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.large_binary()),
        include_columns=names,
        null_values=[""],
        strings_can_be_null=True,
    )
    columns = []
    for cells in csv.read_csv(_open(data.path), read, parse, convert).columns:
        try:
            columns.append(cells.cast(pa.large_string()))
        except pa.ArrowInvalid:
            texts = [cell if cell is None else readable(cell) for cell in cells.to_pylist()]
            columns.append(pa.chunked_array([texts], pa.large_string()))
    return columns


def _typed(texts: Any) -> Any:
    """A CSV's column as numbers or booleans, where all of its cells are."""
    from pyarrow import compute

    for kind, pattern in CELLS.items():
        if compute.all(compute.match_substring_regex(texts, pattern), min_count=1).as_py():
            return texts.cast(kind)
    return texts


def _carried_of_parquet(data: ListConfig) -> list[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(_open(data.path), pre_buffer=False)
    names = find_columns(file.schema_arrow.names, data.carry, f"data.path={data.path!r}")
    table = file.read(columns=names, use_threads=False)
    columns = []
    for column in (table[name] for name in names):
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        wide = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}.get(kind, kind)
        columns.append(column.cast(wide))
    return columns


def _columns(given: list[str], boxes: Sequence[str] = ()) -> dict[str, str]:
    """Find the columns path and label among the given names, which may have blanks around them, and those of boxes."""
    found = [name for name in given if name.strip() in ("path", "label")]
    names = {name.strip(): name for name in found}
    require(len(names) == len(found), "data.path", "a list with one column path and one label", given, "Rename some.")
    near = [name for name in given if name.strip(" \t\"'").lower() in ("label", "labels")]
    if "label" not in names and near:
        log.warning("data.path: column %r is not taken for labels: call it label", near[0])
    others = [name.strip() for name in given if name not in found]
    for number, box in enumerate(boxes):
        require(others.count(box) == 1, "data.box_column", f"among {', '.join(others)}", box, "Name one of them.")
        names[f"{BOX}{number}"] = next(name for name in given if name not in found and name.strip() == box)
    return names


def _as_bytes(names: dict[str, str]) -> Any:
    import pyarrow as pa
    from pyarrow import csv

    texts = {given: pa.large_string() for name, given in names.items() if name.startswith(BOX)}
    return csv.ConvertOptions(
        column_types={names["path"]: pa.large_binary(), **texts}, include_columns=list(names.values())
    )
