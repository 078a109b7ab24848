"""The manifest and the status."""

import json
from pathlib import Path

import pytest

from mgpu_ddp.errors import UsageError
from mgpu_ddp.output.manifest import Manifest, Part, write_status
from tests.support.run_folders import claim, wanted, write_parts


def test_it_comes_back_as_written(tmp_path: Path) -> None:
    assert Manifest.read(tmp_path) is None
    part = Part(file="f", first=0, rows=7, errors=1, num_bytes=9, sha256="x", reasons={"3": "why"})
    manifest = wanted(parts=[part], world_sizes=[2, 1], versions={"torch": "2"}, complete=True)
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert (manifest.prefix, manifest.errors, wanted(start=5).prefix) == (7, 1, 5)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"parts": []}', b'{"parts": [{"file": 1}]}', b"\xff\xfe", b'{"other": 1}']
)
def test_a_broken_manifest_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"manifest\.json is not a manifest that can be read \(\w+\)\. Choose another"):
        claim(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(("status", "reason"), [("running", None), ("failed", "why")])
def test_status_counts_every_sample(tmp_path: Path, status: str, reason: str | None) -> None:
    folder = claim(tmp_path)
    write_parts(folder, 8)
    write_status(tmp_path, status, folder.claimed, reason)
    assert json.loads((tmp_path / "status.json").read_text()) == {
        "status": status,
        "reason": reason,
        "counts": {"total": 20, "ok": 7, "error": 1, "missing": 12},
    }
