"""Files by URL, in object stores and on web servers: many requests at a time, each with retries and backoff (retry.py).

fsspec has a file system for each protocol, and finds credentials in the places its users know.
"""

import asyncio
import functools
import io
import os
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Future
from hashlib import sha256
from typing import Any
from urllib.parse import quote, unquote

from mgpu_ddp.config.checks import PROTOCOLS, protocol_of
from mgpu_ddp.data.retry import one_line, with_retries
from mgpu_ddp.errors import StateError, UsageError

IN_FLIGHT = 64
"""Requests of one process at a time."""
BUFFER_BYTES = 8 << 20
"""Read at once of a file that is read from front to back."""
OPTIONS: dict[str, dict[str, Any]] = {
    # One request an image, without one for its size first.
    "s3": {
        "max_concurrency": 1,
        "config_kwargs": {"max_pool_connections": IN_FLIGHT, "retries": {"total_max_attempts": 1}},
    },
}
VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "Last-Modified", "last_modified", "updated")
"""The names file systems give a value that changes with the content, best first."""


class _FileSystem:
    """fsspec's file system of one protocol, in the process that asked for it."""

    def __init__(self, protocol: str) -> None:
        check_package(protocol)
        import fsspec
        from fsspec.asyn import get_loop

        options = OPTIONS.get(protocol, {}) | {"use_listings_cache": False, "skip_instance_cache": True}
        self.fs = fsspec.filesystem(protocol, **options)
        if hasattr(self.fs, "retries"):
            # Or its retries would multiply ours.
            self.fs.retries = 1
        self.received_bytes = 0
        self._loop = get_loop()
        self._slots = asyncio.Semaphore(IN_FLIGHT)

    def start(self, method: str, url: str, *, most_bytes: int | None = None, **kwargs: Any) -> Future[Any]:
        """Start a call of one of the file system's methods, whose answer has at most so many bytes."""
        path = self.fs._strip_protocol(url)
        if self.fs.async_impl:
            request = functools.partial(getattr(self.fs, f"_{method}"), path, **kwargs)
        else:
            request = functools.partial(asyncio.to_thread, getattr(self.fs, method), path, **kwargs)
        return asyncio.run_coroutine_threadsafe(self._answer(request, url, most_bytes), self._loop)

    async def _answer(self, request: Callable[[], Awaitable[Any]], url: str, most_bytes: int | None) -> Any:
        async with self._slots:
            answer = await with_retries(request, url)
        if most_bytes is not None and len(answer) > most_bytes:
            raise StateError(
                f"the server of {url!r} sends whole files, not parts of them. Copy the file to a disk or an object"
                " store, or store its images one by one."
            )
        if isinstance(answer, bytes):
            self.received_bytes += len(answer)
        return answer


_file_systems: dict[tuple[str, int], _FileSystem] = {}
"""By protocol and process: connections do not survive a fork."""


def check_package(protocol: str) -> None:
    """Check that files can be read by this protocol.

    Raises:
        UsageError: names the package that is missing.
    """
    try:
        import fsspec

        fsspec.get_filesystem_class(protocol)
    except ImportError:
        raise UsageError(
            f"{protocol}:// needs the package {PROTOCOLS[protocol]}. Install it: pip install 'mgpu-ddp[cloud]'."
        ) from None


def _file_system(url: str) -> _FileSystem:
    key = protocol_of(url), os.getpid()
    if key not in _file_systems:
        _file_systems[key] = _FileSystem(key[0])
    return _file_systems[key]


def received_bytes() -> int:
    """Count the bytes of files that this process has received so far."""
    return sum(fs.received_bytes for (_, process), fs in _file_systems.items() if process == os.getpid())


def start_read(url: str, start: int | None = None, end: int | None = None) -> Future[bytes]:
    """Start to read a file, or its bytes from `start` to before `end`.

    The result raises StateError for what is wrong with the whole store, anything else for what is wrong with this file.
    """
    most_bytes = None if start is None or end is None else end - start
    return _file_system(url).start("cat_file", url, most_bytes=most_bytes, start=start, end=end)


def join(root: str, name: str) -> str:
    """The URL of a file below a root, unless its name is a URL itself."""
    if protocol_of(name):
        return name
    return f"{root}/{quote(name) if _is_web(root) else name}"


def _is_web(url: str) -> bool:
    return protocol_of(url) in ("http", "https")


def find(url: str) -> list[str]:
    """List the names of all files below a URL, relative to it.

    Raises:
        UsageError: it cannot be listed.
    """
    system = _file_system(url)
    # A web server has a page for a folder where its name ends like this.
    top = f"{url}/" if _is_web(url) else url
    found = _listed(system.start("find", top), "data.root", url)
    root = system.fs._strip_protocol(url).rstrip("/") + "/"
    names = [name.removeprefix(root) for name in found if name != root]
    return [unquote(name) for name in names] if _is_web(url) else names


def glob(pattern: str) -> list[str]:
    """List the URLs that a pattern with * matches.

    Raises:
        UsageError: they cannot be listed.
    """
    system = _file_system(pattern)
    found = _listed(system.start("glob", pattern), "data.urls", pattern)
    return sorted(system.fs.unstrip_protocol(name) for name in found)


def _listed(answer: Future[Iterable[str]], key: str, url: str) -> list[str]:
    try:
        return list(answer.result())
    except StateError:
        raise
    except Exception as error:
        raise UsageError(f"{key}={url!r} cannot be listed ({one_line(error)}). Correct it.") from None


def size_and_version(url: str) -> tuple[int, int]:
    """The size in bytes, and a number that changes with the content.

    Raises:
        FileNotFoundError, PermissionError: the file is missing or forbidden.
        StateError: the store cannot be read.
    """
    try:
        info = _file_system(url).start("info", url).result()
    except FileNotFoundError:
        raise
    except OSError:
        # S3 answers HEAD without a body, so nothing says whose fault it is. The answer to a GET of one byte does.
        start_read(url, 0, 1).result()
        raise
    version = next((str(info[name]).strip('"') for name in VERSIONS if info.get(name)), "")
    return int(info["size"]), int.from_bytes(sha256(version.encode()).digest()[:7])


class RemoteFile(io.RawIOBase):
    """A file by URL that can be read anywhere."""

    def __init__(self, url: str) -> None:
        self._url, self._place = url, 0
        self._size, _ = size_and_version(url)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        stop = min(self._place + len(buffer), self._size)
        if stop <= self._place:
            return 0
        data = start_read(self._url, self._place, stop).result()
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def open_file(url: str) -> io.BufferedReader:
    """Open a file by URL to read it from front to back."""
    return io.BufferedReader(RemoteFile(url), BUFFER_BYTES)
