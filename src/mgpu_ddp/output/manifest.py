"""The manifest: the job's identity and the parts that are done."""

import hashlib
import json
import math
import re
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mgpu_ddp.data.carried import from_text
from mgpu_ddp.errors import StateError, UsageError, cause_of
from mgpu_ddp.output.atomic_files import replace_json
from mgpu_ddp.output.formats import FORMATS
from mgpu_ddp.output.regular_files import map_array, open_regular, read_json

MANIFEST, STATUS = "manifest.json", "status.json"
PARTS = "predictions"
ARRAY = "predictions.npy"
TABLES = tuple(each.suffix for each in FORMATS.values())
PART_FILE = rf"{PARTS}/part-(?P<first>[0-9]{{12,}})-[0-9a-z]+(-[0-9]+)?(?P<suffix>{'|'.join(map(re.escape, TABLES))})"
"""The naming rule of parts, relative to the run folder."""
LARGEST_MANIFEST = 2 << 30
"""One of many ranks that each write their parts grows by hundreds of megabytes an hour."""

CHECKSUM = "checksum"
"""The key of the sha256 over all else. Manifests written before there was one lack it."""


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is_positive(value: Any) -> bool:
    return _is_count(value) and value > 0


def _is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _is_text(value: Any) -> bool:
    return type(value) is str


def _matches(pattern: str) -> Callable[[Any], bool]:
    matches = re.compile(pattern).fullmatch
    return lambda value: type(value) is str and matches(value) is not None


def _is_shard(value: Any) -> bool:
    return _matches("[0-9]{1,9}/[0-9]{1,9}")(value) and int(value.split("/")[0]) < int(value.split("/")[1])


def _list_of(is_item: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: type(value) is list and all(map(is_item, value))


def _map_of(is_key: Callable[[Any], bool], is_value: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: type(value) is dict and all(is_key(k) and is_value(v) for k, v in value.items())


def _is_column(value: Any) -> bool:
    is_kind = _matches("bool|object|u?int(8|16|32|64)|float(16|32|64)")
    return (
        type(value) is dict
        and value.keys() - {"arrow"} == {"name", "dtype", "shape", "ragged"}
        and (_is_text(value["name"]) and (is_kind(value["dtype"]) if "arrow" not in value else _is_arrow(value)))
        and (_list_of(_is_count)(value["shape"]) and type(value["ragged"]) is bool)
    )


def _is_arrow(value: Any) -> bool:
    return _is_text(value["arrow"]) and [str(kind) for kind in from_text(value["arrow"]).types] == [value["dtype"]]


Rules = dict[str, tuple[Callable[[Any], bool], str]]
"""The rule of each key of a JSON object, as a function and in words."""

PART_RULES: Rules = {
    "file": (_matches(f"{PART_FILE}|{re.escape(ARRAY)}"), "a name that a job gives"),
    "first": (_is_count, "a count"),
    "rows": (_is_positive, "at least 1"),
    "errors": (_is_count, "a count"),
    "num_bytes": (_is_count, "a count"),
    "sha256": (_matches("[0-9a-f]{64}"), "64 hexadecimal digits"),
    "split_rows": (_is_count, "a count"),
    "reasons": (_map_of(_matches(r"[0-9]{1,18}"), _is_text), "reasons by index"),
}
START_RULES: Rules = {
    "began": (_is_seconds, "seconds"),
    "wall_s": (_is_seconds, "seconds"),
    "rows": (_is_count, "a count"),
    "ranks": (_is_positive, "at least 1"),
}
MANIFEST_RULES: Rules = {
    "fingerprint": (
        lambda value: type(value) is dict and value.get("output.format") in [*FORMATS, "npy"],
        "the keys of a job with its output.format",
    ),
    "start": (_is_count, "a count"),
    "stop": (_is_count, "a count"),
    "batch_size": (_is_positive, "at least 1"),
    "parts": (_list_of(lambda value: type(value) is dict), "a list of parts"),
    "world_sizes": (_list_of(_is_positive), "a list of counts"),
    "versions": (_map_of(_is_text, _is_text), "versions by name"),
    "complete": (lambda value: type(value) is bool, "true or false"),
    "token": (_matches("[0-9a-z]*"), "letters and digits"),
    "slurm_job": (_is_text, "a text"),
    "shard": (lambda value: value is None or _is_shard(value), "i/n or null"),
    "columns": (_list_of(_is_column), "a list of columns"),
    "starts": (_list_of(lambda value: type(value) is dict), "a list of starts"),
    "left_out": (_map_of(_is_text, _is_count), "counts by kind"),
    "changed": (lambda value: type(value) is bool, "true or false"),
    "weights": (lambda value: value is None or _is_text(value), "a text or null"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A durable stretch [first, first + rows) of the dataset, as the manifest lists it."""

    file: str
    """Relative to the run folder."""
    first: int
    rows: int
    errors: int
    num_bytes: int
    sha256: str
    split_rows: int = 0
    """Rows whose batch was split for lack of memory: their last bits may differ."""
    reasons: dict[str, str] = field(default_factory=dict)
    """index → reason, for a format that has no place for reasons."""

    @property
    def stop(self) -> int:
        return self.first + self.rows

    def has_its_size(self, run_dir: Path) -> bool:
        """Compare the length of the file with that at its commit; False where it is gone."""
        path = run_dir / self.file
        try:
            if self.file == ARRAY:
                # numpy compares the header with the length of the file.
                map_array(path)
                return True
            status = path.lstat()
            return stat.S_ISREG(status.st_mode) and status.st_size == self.num_bytes
        except (OSError, ValueError):
            return False


@dataclass(kw_only=True, slots=True)
class Start:
    """One of the times that the job was started."""

    began: float
    """Seconds since 1970."""
    ranks: int
    wall_s: float = 0.0
    """Until its last commit, if it was killed."""
    rows: int = 0
    """Rows that it committed, retried ones included."""


@dataclass(kw_only=True, slots=True)
class Manifest:
    """The job's identity and the parts that are done."""

    fingerprint: dict[str, Any]
    """The keys that decide the rows, resolved: another value is another job."""
    start: int
    stop: int
    batch_size: int
    parts: list[Part] = field(default_factory=list)
    world_sizes: list[int] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    complete: bool = False
    token: str = ""
    """Tells the attempt that claimed the folder last from others; part names carry it."""
    slurm_job: str = ""
    """The SLURM job that began it, where one did."""
    shard: str | None = None
    """i/n, where it is one of n independent jobs."""
    columns: list[dict[str, Any]] = field(default_factory=list)
    """The columns that samples carry and that become of the model's outputs, as `ColumnType` has them."""
    starts: list[Start] = field(default_factory=list)
    """In order. Manifests written before there was this list lack the earlier ones."""
    left_out: dict[str, int] = field(default_factory=dict)
    """How many files beside the samples were not taken for images, by kind."""
    changed: bool = False
    """Some error rows are those of images that were replaced, and that are to be predicted again."""
    weights: str | None = None
    """The weights by name, as `Resolved` has them; None in older manifests too. The fingerprint has their digest."""

    @property
    def prefix(self) -> int:
        """The first index that is not committed."""
        return self.parts[-1].stop if self.parts else self.start

    @property
    def errors(self) -> int:
        return sum(part.errors for part in self.parts)

    @property
    def output_format(self) -> str:
        """`output.format` of the job."""
        return str(self.fingerprint["output.format"])

    @property
    def has_classes(self) -> bool:
        """True where the model returns logits, and rows name classes."""
        return self.fingerprint["model.num_classes"] is not None

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of a row in the tutorial's array of predictions; empty where the model has columns of its own."""
        if self.output_format == "npy":
            return tuple(self.columns[-1]["shape"])
        return (self.fingerprint["model.num_classes"],) if self.has_classes else ()

    @classmethod
    def read(cls, run_dir: Path) -> "Manifest | None":
        """The manifest of a folder, None where there is none.

        Raises:
            UsageError: the file is not a manifest of ours, or a damaged one.
        """
        path = run_dir / MANIFEST
        try:
            return _parse(read_json(path, LARGEST_MANIFEST))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{path} is not a manifest that can be read ({cause_of(error)}). Choose another output.dir."
            ) from None

    def write(self, run_dir: Path) -> None:
        # The token comes first, where `check_claim` looks for it.
        content = {"token": self.token, **asdict(self)}
        replace_json(run_dir / MANIFEST, content | {CHECKSUM: _checksum(content)})

    def count_work(self, rows: int) -> None:
        """Note that the last start has been at work until now, and has committed so many more rows."""
        if self.starts:
            last = self.starts[-1]
            last.rows += rows
            # Clocks may be set back.
            last.wall_s = max(last.wall_s, round(time.time() - last.began, 3))

    def check_claim(self, run_dir: Path) -> None:
        """Require that nobody else has claimed the folder since this manifest did.

        Raises:
            StateError: another token stands there.
            OSError: the folder holds no manifest any more.
        """
        mine = json.dumps({"token": self.token}, indent=1).removesuffix("\n}").encode()
        with open_regular(run_dir / MANIFEST) as file:
            found = file.read(len(mine))
        if found != mine:
            raise StateError(
                f"{run_dir} was claimed by another job while this one was at work. This one ends; start it again once"
                " the other has ended."
            )


def _checksum(content: Mapping[str, Any]) -> str:
    """sha256 over a manifest's values, whatever their order and the white space between them."""
    rest = {key: value for key, value in content.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _parse(raw: Any) -> Manifest:
    """The manifest that a JSON value is.

    Raises:
        ValueError: it is none; the message says why.
    """
    if type(raw) is not dict:
        raise ValueError("it is not a JSON object")
    if CHECKSUM in raw and raw[CHECKSUM] != _checksum(raw):
        raise ValueError("it was changed since it was written")
    values = {key: value for key, value in raw.items() if key != CHECKSUM}
    _check_keys(values, MANIFEST_RULES, _required(Manifest), "")
    required = _required(Part)
    for number, part in enumerate(values.get("parts", [])):
        _check_keys(part, PART_RULES, required, f"parts[{number}].")
    for number, start in enumerate(values.get("starts", [])):
        _check_keys(start, START_RULES, _required(Start), f"starts[{number}].")
    lists = {
        "parts": [Part(**part) for part in values.get("parts", [])],
        "starts": [Start(**start) for start in values.get("starts", [])],
    }
    manifest = Manifest(**{**values, **lists})
    _check_parts(manifest)
    return manifest


def _check_keys(values: dict[str, Any], rules: Rules, required: set[str], where: str) -> None:
    if missing := sorted(required - values.keys()):
        raise ValueError(f"it lacks {where}{missing[0]}")
    if unknown := sorted(values.keys() - rules.keys()):
        raise ValueError(f"{where}{unknown[0]!r} is not a key of this version")
    for key, value in values.items():
        holds, rule = rules[key]
        if not holds(value):
            raise ValueError(f"{where}{key} is not {rule}")


def _required(of: type[Any]) -> set[str]:
    return {each.name for each in fields(of) if each.default is MISSING and each.default_factory is MISSING}


def _check_parts(manifest: Manifest) -> None:
    """Check that the parts follow each other, lie within the job's range, and are named and counted as they should."""
    prefix = manifest.start
    for number, part in enumerate(manifest.parts):
        if part.first != prefix:
            raise ValueError(f"parts[{number}] begins at row {part.first}, not {prefix}")
        prefix = part.stop
        if part.file != _file_of(part, manifest.output_format):
            raise ValueError(f"parts[{number}].file is not the name of its rows")
        is_array = part.file == ARRAY
        if part.errors > part.rows or len(part.reasons) != (part.errors if is_array else 0):
            raise ValueError(f"parts[{number}] has another number of errors")
        if not all(part.first <= int(index) < part.stop for index in part.reasons):
            raise ValueError(f"parts[{number}].reasons are of other rows")
    if prefix > manifest.stop:
        raise ValueError(f"its rows end at {prefix}, after the last, {manifest.stop}")
    if manifest.complete and prefix != manifest.stop:
        raise ValueError(f"its rows end at {prefix}, but complete ones would at {manifest.stop}")


def _file_of(part: Part, output_format: str) -> str | None:
    """The name that a part has, None where it names another format or other rows."""
    if output_format == "npy":
        return ARRAY
    name = re.fullmatch(PART_FILE, part.file)
    ok = name is not None and name["suffix"] == FORMATS[output_format].suffix and int(name["first"]) == part.first
    return part.file if ok else None


def write_status(
    run_dir: Path, status: str, manifest: Manifest, reason: str | None = None, next_command: str | None = None
) -> None:
    """Write `status.json`: running, complete, failed or preempted, with counts, and how to go on. Rank 0 only.

    Also while the job runs: a job that is killed writes no more.
    """
    total, rows = manifest.stop - manifest.start, manifest.prefix - manifest.start
    counts = {"total": total, "ok": rows - manifest.errors, "error": manifest.errors, "missing": total - rows}
    content = {"status": status, "reason": reason, "next": next_command, "counts": counts, "weights": manifest.weights}
    replace_json(run_dir / STATUS, content)
