"""Repositories of the hub, of its cache and in folders, against a server that answers as the hub does."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from mgpu_ddp.errors import UsageError
from mgpu_ddp.models.hub import Repository
from tests.support.hubs import COMMIT, Hub, point_to, serve

NAME = "org/repo"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    folder = tmp_path / "hub" / NAME
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"architecture": "a"}')
    (folder / "other.json").write_text("{}")
    with serve(tmp_path / "hub", tmp_path / "cache", monkeypatch) as found:
        yield found


def of_hub(name: str = NAME) -> Repository:
    return Repository("model.name", f"hf_hub:{name}", name)


def refusal(repository: Repository, file: str = "config.json") -> str:
    began = time.monotonic()
    with pytest.raises(UsageError) as raised:
        repository.get(file)
    assert time.monotonic() - began < 10
    text = str(raised.value)
    assert text.startswith("model.name must be ")
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_a_file_is_downloaded_once_and_all_are_of_its_commit(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = of_hub()
    assert repository.read_json("config.json") == {"architecture": "a"}
    assert repository.revision == COMMIT
    assert repository.get("missing.json") is None
    asked = len(hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = of_hub()
    assert again.read_json("config.json") == {"architecture": "a"}
    assert len(hub.asked) == asked
    # The other file is not in the cache, and nothing says that it does not exist.
    assert "OfflineModeIsEnabled" in refusal(again, "other.json")


def test_a_revision_is_named_after_an_at(hub: Hub) -> None:
    assert of_hub(f"{NAME}@{COMMIT}").get("config.json") is not None
    assert "org/repo at a revision of it, got 'hf_hub:org/repo@v9' (404, Rev" in refusal(of_hub(f"{NAME}@v9"))
    for revision in ("", "../../other", "a b"):
        with pytest.raises(UsageError, match=r"^model\.name must be ORG/REPO or ORG/REPO@REVISION, got 'hf_hub:org"):
            of_hub(f"{NAME}@{revision}")


@pytest.mark.parametrize("name", ["a/b/c", "..", "a/..", "-x/y", "", "a b/c"])
def test_names_are_those_of_repositories(hub: Hub, name: str) -> None:
    assert "must be ORG/REPO or ORG/REPO@REVISION, got" in refusal(of_hub(name))
    assert not hub.asked


def test_what_the_hub_refuses_is_one_line(hub: Hub) -> None:
    assert f"a repository at {hub.url}, got 'hf_hub:org/none' (404, Repo" in refusal(of_hub("org/none"))
    for status, words in ((401, "set HF_TOKEN"), (403, f"Accept its terms at {hub.url}/{NAME}"), (503, "reachable")):
        hub.status = status
        assert words in refusal(of_hub())


@pytest.mark.parametrize("how", ["refused", "silent"])
def test_without_a_network_one_line_says_what_to_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        if how == "refused":
            server.close()
        point_to(url, tmp_path, monkeypatch)
        text = refusal(of_hub())
    assert text.endswith(
        f"Fetch {url}/org/repo where there is a network and give its folder, or copy models--org--repo from its cache"
        f" to {tmp_path}."
    )


def test_a_folder_needs_no_hub(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": 1}')
    folder = Repository("model.name", "local-dir:here", "", folder=tmp_path)
    assert folder.read_json("config.json") == {"a": 1}
    assert folder.get("other.json") is None
    assert "names '../config.json'" in refusal(folder, "../config.json")
    assert "a folder" in refusal(Repository("model.name", "local-dir:none", "", folder=tmp_path / "none"))


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a": 1, "a": 2}', '{"a": NaN}', "[" * 100_000, '{"a": ' * 100_000, "\ud800"]
)
def test_json_is_one_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UsageError, match=r"^model\.name must be one whose JSON files hold an object, got 'x' \(config"):
        Repository("model.name", "x", "", folder=tmp_path).read_json("config.json")


def test_pickles_are_not_read_but_converted_by_the_user(hub: Hub, tmp_path: Path) -> None:
    assert "(it has no model.safetensors)" in str(of_hub().without_safetensors())
    (tmp_path / "hub" / NAME / "pytorch_model.bin").write_bytes(b"")
    assert "(it has pytorch_model.bin alone). Download it, convert it by python -c" in str(
        of_hub().without_safetensors()
    )
