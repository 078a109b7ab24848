"""A small HTTP server that answers for files of repositories as the Hugging Face hub does."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFUSED = {401: "RepoNotFound", 403: "GatedRepo"}


class Hub:
    """Serves the folders of `root`, ORG/REPO, each of one commit."""

    def __init__(self, root: Path) -> None:
        self.root, self.asked = root, list[str]()
        self.status = 200
        """Another refuses everything."""
        self.url = ""

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """Status, the hub's word for what is wrong, and the content."""
        repository, _, rest = unquote(path).lstrip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        self.asked.append(f"{repository}/{file}")
        if self.status != 200:
            return self.status, REFUSED.get(self.status, ""), b""
        if not (self.root / repository).is_dir():
            return 404, "RepoNotFound", b""
        if revision not in ("main", COMMIT):
            return 404, "RevisionNotFound", b""
        path_of = self.root / repository / file
        return (200, "", path_of.read_bytes()) if path_of.is_file() else (404, "EntryNotFound", b"")


@contextmanager
def serve(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Let this process, and the processes it starts, take a folder for the hub, with an empty cache."""
    hub = Hub(root)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, error, content = hub.answer(self.path)
            self.send_response(status)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            if error:
                self.send_header("X-Error-Code", error)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        point_to(hub.url, cache, monkeypatch)
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def point_to(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `url` be the hub, of this process and of those that it starts."""
    # Of those, because this process may be told otherwise.
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
