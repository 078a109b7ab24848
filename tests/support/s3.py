"""The object store of the benchmark, for tests."""

import os

import pytest

from mgpu_ddp.data import object_store
from scripts.benching.stores import EXPIRED, KEY, SECRET, SLOW_DOWN, Proxy, credentials, proxied, served

__all__ = ["EXPIRED", "KEY", "SECRET", "SLOW_DOWN", "Proxy", "proxied", "served", "use"]


def use(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Let S3's clients find the server and its credentials where their users put them."""
    object_store._file_systems.clear()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in credentials(port).items():
        monkeypatch.setenv(name, value)
