"""Files by URL: in object stores and on web servers, with many requests in flight and patience for their moods.

fsspec has a file system for each protocol, and finds credentials in the places its users know. What may go over by
itself (a reset connection, a 503, a timeout) is asked for again after a while that grows. What stays is told apart by
whose fault it is: an image that is not there is that image's own, whereas a store that does not answer, or credentials
that it no longer takes, end the job before images that are fine become error rows.
"""

import asyncio
import functools
import io
import os
import random
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Future
from hashlib import sha256
from typing import Any
from urllib.parse import quote, unquote

from mgpu_ddp.config.checks import PROTOCOLS, protocol_of
from mgpu_ddp.errors import StateError, UsageError

IN_FLIGHT = 64
"""Requests of one process."""
ATTEMPTS = 9
FIRST_PAUSE_S, PAUSE_GROWTH = 0.1, 2.0
"""Before the second attempt, and how much longer each later one is; half of it by chance."""
BUFFER_BYTES = 8 << 20
"""That are read at once of a file that is read from front to back."""
OPTIONS: dict[str, dict[str, Any]] = {
    # One request an image, without one for its size first.
    "s3": {
        "max_concurrency": 1,
        "config_kwargs": {"max_pool_connections": IN_FLIGHT, "retries": {"total_max_attempts": 1}},
    },
}
OWN_FAULTS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""Of one file; all other files may be well."""
REFUSED = (
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "NoCredentials",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
)
"""What a store calls credentials that it does not take. Source: "Error responses" in Amazon's S3 API reference."""
VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "Last-Modified", "last_modified", "updated")
"""What file systems call that which changes with the content, best first."""


class _FileSystem:
    """fsspec's file system of one protocol, in the process that asked for it."""

    def __init__(self, protocol: str) -> None:
        package = PROTOCOLS[protocol]
        try:
            import fsspec
            from fsspec.asyn import get_loop

            options = OPTIONS.get(protocol, {}) | {"use_listings_cache": False, "skip_instance_cache": True}
            self.fs = fsspec.filesystem(protocol, **options)
            if hasattr(self.fs, "retries"):
                # Patience is this module's part, and does not multiply.
                self.fs.retries = 1
        except ImportError:
            raise UsageError(
                f"{protocol}:// must have its package, got none called {package}. Install mgpu-ddp[cloud]."
            ) from None
        self.received_bytes = 0
        self._loop = get_loop()
        self._room = asyncio.Semaphore(IN_FLIGHT)

    def begin(self, method: str, url: str, *, most_bytes: int | None = None, **kwargs: Any) -> Future[Any]:
        """Call a method of the file system, with patience, for no more than so many bytes."""
        path = self.fs._strip_protocol(url)
        if self.fs.async_impl:
            call = functools.partial(getattr(self.fs, f"_{method}"), path, **kwargs)
        else:
            call = functools.partial(asyncio.to_thread, getattr(self.fs, method), path, **kwargs)
        return asyncio.run_coroutine_threadsafe(self._patiently(call, url, most_bytes), self._loop)

    async def _patiently(self, call: Callable[[], Awaitable[Any]], url: str, most_bytes: int | None) -> Any:
        async with self._room:
            pause_s = FIRST_PAUSE_S
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    found = await call()
                    if most_bytes is not None and len(found) > most_bytes:
                        text = f"{url!r} must be on a server that sends parts of files, got all of it"
                        raise StateError(f"{text}. Copy it, or store its images one by one.")
                    if isinstance(found, bytes):
                        self.received_bytes += len(found)
                    return found
                except StateError:
                    raise
                except Exception as error:
                    if is_own_fault(error):
                        raise
                    if is_refused(error):
                        text = f"{url!r} must be readable with the credentials at hand, got {said(error)}. Renew them"
                        raise StateError(f"{text}, and start again: what was committed stays.") from None
                    if attempt == ATTEMPTS:
                        text = f"{url!r} must be readable, got {said(error)} {ATTEMPTS} times"
                        raise StateError(f"{text}. Start again later: what was committed stays.") from None
                await asyncio.sleep(pause_s * random.uniform(0.5, 1))
                pause_s *= PAUSE_GROWTH
        raise AssertionError


_systems: dict[tuple[str, int], _FileSystem] = {}
"""By protocol and process: connections do not survive a fork."""


def _of(url: str) -> _FileSystem:
    key = protocol_of(url), os.getpid()
    if key not in _systems:
        _systems[key] = _FileSystem(key[0])
    return _systems[key]


def received_bytes() -> int:
    """All that this process has received of files so far."""
    return sum(system.received_bytes for (_, process), system in _systems.items() if process == os.getpid())


def is_refused(error: BaseException) -> bool:
    """Whether a store does not take the credentials."""
    causes = [cause for cause in (error, error.__cause__) if cause is not None]
    words = " ".join(f"{type(cause).__name__} {cause} {getattr(cause, 'response', '')}" for cause in causes)
    return any(word in words for word in REFUSED) or _status(error) == 401


def is_own_fault(error: BaseException) -> bool:
    """Whether it says something of one file only, and will say so again."""
    if is_refused(error):
        return False
    status = _status(error)
    if status is not None:
        # Request timeout, too early, too many requests: these go over.
        return 400 <= status < 500 and status not in (408, 425, 429)
    # fsspec says of a web server that does not answer that there is no such file.
    return isinstance(error.__cause__ or error, OWN_FAULTS)


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of any client library comes from."""
    for cause in (error, error.__cause__):
        response = getattr(cause, "response", None)
        metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        for found in (
            metadata.get("HTTPStatusCode"),
            getattr(response, "status_code", None),
            getattr(cause, "status", None),
        ):
            if isinstance(found, int):
                return found
    # Google's. A cause's may be a parser's: 400 for a body that breaks off.
    code = getattr(error, "code", None)
    return code if isinstance(code, int) else None


def said(error: BaseException) -> str:
    """An error in one line, in the words of the store."""
    error = error.__cause__ or error
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(": .")


def begin(url: str, start: int | None = None, end: int | None = None) -> Future[bytes]:
    """Begin to read a file, or its bytes from `start` to before `end`.

    The result raises what is wrong with this file, or StateError for what is wrong with all of them.
    """
    most = None if start is None or end is None else end - start
    return _of(url).begin("cat_file", url, most_bytes=most, start=start, end=end)


def join(root: str, name: str) -> str:
    """The URL of a file that is called so below a root, unless its name is a URL itself."""
    if protocol_of(name):
        return name
    return f"{root}/{quote(name) if _is_web(root) else name}"


def _is_web(url: str) -> bool:
    return protocol_of(url) in ("http", "https")


def find(url: str) -> list[str]:
    """The names of all files below a URL, relative to it.

    Raises:
        UsageError: it cannot be listed.
    """
    system = _of(url)
    # A web server has a page for a folder where its name ends like this.
    top = f"{url}/" if _is_web(url) else url
    found: Iterable[str] = _listed(system.begin("find", top), "data.root", url)
    root = system.fs._strip_protocol(url).rstrip("/") + "/"
    names = [name.removeprefix(root) for name in found if name != root]
    return [unquote(name) for name in names] if _is_web(url) else names


def glob(pattern: str) -> list[str]:
    """The URLs that a pattern with * stands for.

    Raises:
        UsageError: they cannot be listed.
    """
    system = _of(pattern)
    return sorted(
        system.fs.unstrip_protocol(name) for name in _listed(system.begin("glob", pattern), "data.urls", pattern)
    )


def _listed(asked: Future[Any], key: str, url: str) -> Iterable[str]:
    try:
        return list(asked.result())
    except StateError:
        raise
    except Exception as error:
        raise UsageError(f"{key} must be there and may be listed, got {url!r} ({said(error)}). Name another.") from None


def look_at(url: str) -> tuple[int, int]:
    """Size in bytes, and a number that changes with the content.

    Raises:
        FileNotFoundError, PermissionError: there is none.
        StateError: what is wrong is wrong with all files.
    """
    try:
        info = _of(url).begin("info", url).result()
    except FileNotFoundError:
        raise
    except OSError:
        # S3 answers HEAD without a body, so that nothing says whose fault it is: what it says of one byte tells.
        begin(url, 0, 1).result()
        raise
    version = next((str(info[name]).strip('"') for name in VERSIONS if info.get(name)), "")
    return int(info["size"]), int.from_bytes(sha256(version.encode()).digest()[:7])


class RemoteFile(io.RawIOBase):
    """A file of a URL that can be read anywhere."""

    def __init__(self, url: str) -> None:
        self._url, self._place = url, 0
        self._size, _ = look_at(url)

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
        data = begin(self._url, self._place, stop).result()
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def open_file(url: str) -> io.BufferedReader:
    """A file of a URL to read from front to back."""
    return io.BufferedReader(RemoteFile(url), BUFFER_BYTES)


Request = Callable[[int], Future[bytes]]


class Ahead:
    """What was asked for before it is needed."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._begun: dict[int, Future[bytes]] = {}

    def expect(self, indices: Iterable[int]) -> None:
        """These are needed next, in this order; what else was begun is given up."""
        wanted = dict.fromkeys(indices)
        for index in self._begun.keys() - wanted.keys():
            self._begun.pop(index).cancel()
        for index in wanted:
            if index not in self._begun:
                self._begun[index] = self._request(index)

    def take(self, index: int) -> bytes:
        begun = self._begun.pop(index, None)
        return (begun or self._request(index)).result()
