"""A folder served by the protocol of S3 (rclone), behind a proxy that makes the network as bad as is wanted."""

import asyncio
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mgpu_ddp.data import object_store

RCLONE = Path(sys.executable).parent / "rclone"
KEY, SECRET = "AKIDTEST", "d0n-t-t3ll/anybody+this=="
SLOW_DOWN = (503, "SlowDown"), (500, "InternalError")
EXPIRED = 400, "ExpiredToken"
HEADERS_END = b"\r\n\r\n"
STARTS_WITHIN_S = 20


@dataclass(kw_only=True)
class Proxy:
    """Passes requests on, one connection there for each one here; `fault` may spoil the n-th one for an object."""

    upstream: int
    latency_s: float = 0.0
    fault: Callable[[int], "tuple[int, str] | str | None"] = lambda number: None
    """None, an HTTP status with S3's code for it, or `reset` for a connection that breaks off amid the body."""
    asked: int = 0
    """GET and HEAD of objects."""
    most_at_once: int = 0
    port: int = 0
    faults: list[str] = field(default_factory=list)
    _at_once: int = 0

    async def serve(self, ready: threading.Event, stop: asyncio.Event) -> None:
        server = await asyncio.start_server(self._client, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await stop.wait()
        server.close()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        try:
            with suppress(asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.upstream)
                writers.append(far_writer)
                while True:
                    request = await reader.readuntil(HEADERS_END)
                    self._at_once += 1
                    self.most_at_once = max(self.most_at_once, self._at_once)
                    try:
                        await asyncio.sleep(self.latency_s)
                        await self._answer(request, writer, far_reader, far_writer)
                    finally:
                        self._at_once -= 1
        finally:
            for each in writers:
                each.close()
            for each in writers:
                with suppress(ConnectionError):
                    await each.wait_closed()

    async def _answer(
        self,
        request: bytes,
        writer: asyncio.StreamWriter,
        far_reader: asyncio.StreamReader,
        far_writer: asyncio.StreamWriter,
    ) -> None:
        # Of objects, and not of lists of them.
        is_head = request.startswith(b"HEAD ")
        is_asked = (is_head or request.startswith(b"GET ")) and b"?list-type" not in request.split(b"\r\n", 1)[0]
        self.asked += is_asked
        fault = self.fault(self.asked) if is_asked else None
        if isinstance(fault, tuple):
            self.faults.append(fault[1])
            body = f"<?xml version='1.0'?><Error><Code>{fault[1]}</Code><Message>as asked</Message></Error>".encode()
            head = f"HTTP/1.1 {fault[0]} No\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
            # As S3 does: after a HEAD its clients never see the code.
            writer.write(head.encode() + (b"" if is_head else body))
            await writer.drain()
            return
        far_writer.write(request)
        head = await far_reader.readuntil(HEADERS_END)
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        writer.write(head)
        if is_head:
            pass
        elif length is not None:
            left = int(length[1])
            if fault == "reset":
                self.faults.append("reset")
                writer.write(await far_reader.readexactly(left // 2))
                await writer.drain()
                writer.transport.abort()
                raise ConnectionResetError
            while left:
                piece = await far_reader.read(min(left, 1 << 20))
                left -= len(piece)
                writer.write(piece)
        else:
            while (size := await far_reader.readuntil(b"\r\n")) != b"0\r\n":
                writer.write(size + await far_reader.readexactly(int(size, 16) + 2))
            writer.write(size + await far_reader.readuntil(b"\r\n"))
        await writer.drain()


@contextmanager
def proxied(upstream: int) -> Iterator[Proxy]:
    proxy, ready, stop = Proxy(upstream=upstream), threading.Event(), asyncio.Event()
    with asyncio.Runner() as runner:
        # Leaving it cancels the connections that are open, and waits for them.
        loop = runner.get_loop()
        thread = threading.Thread(target=loop.run_until_complete, args=(proxy.serve(ready, stop),))
        thread.start()
        assert ready.wait(STARTS_WITHIN_S)
        try:
            yield proxy
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join()


@contextmanager
def served(folder: Path, log: Path, kind: str = "s3") -> Iterator[int]:
    """Serve a folder, its folders as buckets; the port."""
    options = ["--auth-key", f"{KEY},{SECRET}"] if kind == "s3" else []
    with log.open("w") as errors:
        command = [RCLONE, "serve", kind, "--addr", "127.0.0.1:0", *options, "--config", "/dev/null", folder]
        server = subprocess.Popen(command, stderr=errors)
    try:
        until = time.monotonic() + STARTS_WITHIN_S
        while (found := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())) is None:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < until
            time.sleep(0.01)
        yield int(found[1])
    finally:
        server.kill()
        server.wait()


def use(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Let S3's clients find the server and its credentials where their users put them."""
    object_store._file_systems.clear()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
