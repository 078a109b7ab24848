"""The manifest and the status."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mgpu_ddp.errors import StateError, UsageError
from mgpu_ddp.output.manifest import LARGEST_MANIFEST, Manifest, Part, Start, write_status
from tests.support.run_folders import SAMPLES, claim, wanted, write_parts

FILE = "predictions/part-000000000000-ab12.parquet"


def test_it_comes_back_as_written(tmp_path: Path) -> None:
    assert Manifest.read(tmp_path) is None
    part = Part(file="predictions.npy", first=0, rows=7, errors=1, num_bytes=9, sha256="0" * 64, reasons={"3": "why"})
    starts = [Start(began=1.5e9, ranks=2, wall_s=9.25, rows=7)]
    more: dict[str, Any] = {"world_sizes": [2, 1], "versions": {"torch": "2"}, "starts": starts}
    manifest = wanted("npy", parts=[part], stop=7, complete=True, **more)
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert (manifest.prefix, manifest.errors, wanted(start=5).prefix) == (7, 1, 5)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"null", b'{"parts": []}', b'{"parts": [{"file": 1}]}', b"\xff\xfe", b'{"other": 1}'),
        *(b"[" * 100_000, b'{"a":' * 100_000, b'{"start": 1' + b"0" * 5000 + b"}", b"\0" * 100),
    ],
    ids=range(12),
)
def test_a_broken_manifest_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"manifest\.json is not a manifest that can be read \(.+\)\. Choose another"):
        claim(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def written(tmp_path: Path, how: str = "parquet") -> dict[str, Any]:
    """A complete folder's manifest, as JSON, with two parts that each have an error."""
    folder = claim(tmp_path, how)
    write_parts(folder, 8, 20)
    folder.finish("complete", SAMPLES.path)
    return dict(json.loads((tmp_path / "manifest.json").read_text()))


def put(tmp_path: Path, content: dict[str, Any], *, checksum: bool = False) -> None:
    kept = content if checksum else {key: value for key, value in content.items() if key != "checksum"}
    (tmp_path / "manifest.json").write_text(json.dumps(kept))


def test_a_manifest_of_before_there_was_a_checksum_is_read(tmp_path: Path) -> None:
    content = written(tmp_path)
    expected = Manifest.read(tmp_path)
    assert expected is not None
    del content["token"]
    put(tmp_path, content)
    expected.token = ""
    assert Manifest.read(tmp_path) == expected
    assert claim(tmp_path).claimed.complete


def test_white_space_and_order_are_no_change(tmp_path: Path) -> None:
    content = written(tmp_path)
    expected = Manifest.read(tmp_path)
    put(tmp_path, dict(sorted(content.items(), reverse=True)), checksum=True)
    assert Manifest.read(tmp_path) == expected


@pytest.mark.parametrize("key", ["start", "batch_size", "complete", "fingerprint", "parts", "world_sizes", "checksum"])
def test_what_was_changed_since_it_was_written_is_refused(tmp_path: Path, key: str) -> None:
    content = written(tmp_path)
    content[key] = {"start": 0, "batch_size": 5, "complete": False, "checksum": None}.get(key, content["parts"][:1])
    content["stop"] += key == "start"
    put(tmp_path, content, checksum=True)
    with pytest.raises(UsageError, match=r"\(it was changed since it was written\)"):
        claim(tmp_path)


KEYS: dict[str, list[Any]] = {
    "fingerprint": [None, [], {}, {"output.format": "exe"}, {"output.format": ["npy"]}],
    "start": [None, "0", -1, 0.0, True, 1 << 70, [], 5],
    "stop": [None, "20", -1, 20.0, 19, 21, 1 << 70, float("nan")],
    "batch_size": [None, "4", 0, -4, 4.0, True],
    "parts": [None, {}, "", 3, [None], [[]], [{}]],
    "world_sizes": [None, 1, [0], ["1"], [True], {}],
    "versions": [None, [], {"torch": 2}],
    "complete": [None, 1, "true"],
    "token": [None, 5, "AB", "../x", "a\n"],
    "slurm_job": [None, 5, []],
    "starts": [
        *(None, {}, 3, [None], [[]], [{}]),
        *([{"began": 1.0, "ranks": 1} | spoilt] for spoilt in ({"more": 1}, {"began": "x"}, {"began": float("nan")})),
        *([{"began": 1.0, "ranks": 1} | spoilt] for spoilt in ({"ranks": 0}, {"wall_s": -1.0}, {"rows": 1.5})),
    ],
    "shard": [3, "", "a/b", "1/0", "2/2", "1/2\x1b[2J"],
    "more": [1],
}
PART_KEYS: dict[str, list[Any]] = {
    "file": [
        *(None, 3, "", "../victim.parquet", "/etc/passwd", "predictions/../../victim.parquet", FILE + "\n"),
        *("predictions/thesis.csv", FILE, "predictions.npy", "predictions/part-000000000008-t.csv", "manifest.json"),
    ],
    "first": [None, -8, "8", 7, 9, 8.0, True],
    "rows": [None, 0, -1, "12", 11, 13, 1 << 70, True],
    "errors": [None, -3, "1", 13, 1.0, True],
    "num_bytes": [None, -1, "1", 1.5],
    "sha256": [None, 0, "", "x", "0" * 63, "0" * 65, "G" * 64],
    "split_rows": [None, -1, "0"],
    "reasons": [None, [], {"17": 3}, {"a": "b"}, {"17": "why"}, {"-1": "why"}],
    "more": [1],
}
Spoil = Callable[[dict[str, Any]], None]


def changes() -> dict[str, Spoil]:
    """Ways to spoil a manifest, by name."""

    def setting(key: str, value: Any) -> Spoil:
        return lambda content: content.__setitem__(key, value)

    def setting_part(key: str, value: Any) -> Spoil:
        return lambda content: content["parts"][1].__setitem__(key, value)

    found = {f"{key}={value!r}"[:40]: setting(key, value) for key, values in KEYS.items() for value in values}
    for key, values in PART_KEYS.items():
        found |= {f"part.{key}={value!r}"[:60]: setting_part(key, value) for value in values}
    for key in ("fingerprint", "start", "stop", "batch_size", "parts"):
        found[f"without {key}"] = lambda content, key=key: content.pop(key)  # type: ignore[misc]
    for key in ("file", "first", "rows", "errors", "num_bytes", "sha256"):
        found[f"part without {key}"] = lambda content, key=key: content["parts"][1].pop(key)  # type: ignore[misc]
    for number in (0, 1):
        found[f"without part {number}"] = lambda content, number=number: content["parts"].pop(number)  # type: ignore[misc]
    found["a part twice"] = lambda content: content["parts"].append(content["parts"][0])
    found["parts swapped"] = lambda content: content["parts"].reverse()
    return found


def test_every_key_has_its_rule(tmp_path: Path) -> None:
    """Also where no checksum tells that a hand was at work."""
    content = written(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "predictions").iterdir()}
    accepted, said = [], {}
    for name, spoil in changes().items():
        tampered = json.loads(json.dumps(content))
        spoil(tampered)
        put(tmp_path, tampered)
        try:
            claim(tmp_path)
        except UsageError as error:
            said[name] = str(error)
        else:
            accepted.append(name)
    assert accepted == []
    assert [name for name, text in said.items() if len(text.splitlines()) != 1] == []
    assert {path: path.read_bytes() for path in (tmp_path / "predictions").iterdir()} == before


def test_an_array_has_a_reason_for_each_error(tmp_path: Path) -> None:
    content = written(tmp_path, "npy")
    for reasons in ({}, {"3": "why"}, {"17": "why", "18": "why"}, {"20": "why"}):
        tampered = json.loads(json.dumps(content))
        tampered["parts"][1]["reasons"] = reasons
        put(tmp_path, tampered)
        with pytest.raises(UsageError, match=r"is not a manifest that can be read \(parts\[1\]"):
            claim(tmp_path, "npy")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "device", "huge"])
def test_what_is_no_file_or_too_large_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "run" / "manifest.json"
    path.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "huge":
        path.touch()
        os.truncate(path, LARGEST_MANIFEST + 1)
    else:
        wanted().write(tmp_path)
        path.symlink_to("/dev/zero" if kind == "device" else tmp_path / "manifest.json")
    with pytest.raises(UsageError) as refused:
        Manifest.read(path.parent)
    assert "is not a manifest that can be read" in str(refused.value)


def test_a_claim_is_lost_to_another_token(tmp_path: Path) -> None:
    manifest = wanted(token="abc")
    manifest.write(tmp_path)
    manifest.check_claim(tmp_path)
    for token in ("ab", "abcd", "xyz", ""):
        wanted(token=token).write(tmp_path)
        with pytest.raises(StateError, match="was claimed by another job"):
            manifest.check_claim(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError):
        manifest.check_claim(tmp_path)


@pytest.mark.parametrize(("status", "reason"), [("running", None), ("failed", "why")])
def test_status_counts_every_sample(tmp_path: Path, status: str, reason: str | None) -> None:
    folder = claim(tmp_path)
    write_parts(folder, 8)
    write_status(tmp_path, status, folder.claimed, reason, "again")
    assert json.loads((tmp_path / "status.json").read_text()) == {
        "status": status,
        "reason": reason,
        "next": "again",
        "counts": {"total": 20, "ok": 7, "error": 1, "missing": 12},
        "weights": None,
    }
