"""Heartbeats: each rank beats once a second, rank 0 watches all beats, every wait looks at what it saw."""

import functools
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]

from mgpu_ddp.errors import PeerLostError

BEAT_S = 1.0
DEFAULT_TIMEOUT_S = 180.0


@functools.cache
def _host() -> tuple[str, str]:
    """Identify the machine's boot and the namespace of process ids: who shares both sees the other's process."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")


def _lives(pid: int) -> bool:
    try:
        # A process that its parent has not reaped yet is a zombie. Source: proc(5), /proc/pid/stat.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Heartbeat(threading.Thread):
    """Tells the others that this rank lives and how far it is, and learns whether they live.

    The thread owns its store client: a client blocks while it waits, and a beat must not.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.rank, self.size = rank, size
        self.timeout_s = DEFAULT_TIMEOUT_S
        self.progress: dict[str, Any] = {"at": "start"}
        self.peers: list[dict[str, Any]] = [{} for _ in range(size)]
        self.lost: str | None = None
        self.alarm: str | None = None
        self._store = store
        self._alarm_key: str | None = None
        self._beats = 0
        self._process = [*_host(), os.getpid()]
        self._last = [(b"", time.monotonic())] * size
        self._over = threading.Event()
        self._beat()

    def watch_alarm(self, key: str | None) -> None:
        """Look for the alarm of one job from now on; the one before is forgotten."""
        self.alarm, self._alarm_key = None, key

    def end(self) -> None:
        """Send no more beats."""
        self._over.set()
        self.join()

    def run(self) -> None:
        while not self._over.wait(BEAT_S):
            try:
                self._beat()
                self._look()
            except RuntimeError as error:
                self.lost = self.lost or f"the store on rank 0 does not answer ({str(error).splitlines()[0]})"
                return

    def _beat(self) -> None:
        self._beats += 1
        beat = {**self.progress, "beat": self._beats, "process": self._process}
        self._store.set(f"heartbeat/{self.rank}", json.dumps(beat))

    def _look(self) -> None:
        # Rank 0 looks at every rank, the others at rank 0: the store answers O(size) requests per beat.
        watched = range(self.size) if self.rank == 0 else (0,)
        now = time.monotonic()
        for rank, beat in zip(watched, self._store.multi_get([f"heartbeat/{r}" for r in watched]), strict=True):
            if beat != self._last[rank][0]:
                self._last[rank] = (beat, now)
                self.peers[rank] = json.loads(beat)
            elif now - self._last[rank][1] > self.timeout_s:
                text = (
                    f"rank {rank} of {self.size} sent no heartbeat for {self.timeout_s:g} s (dist.timeout_s),"
                    f" last seen at: {self.peers[rank].get('at')}"
                )
                self._store.set("lost", text)
            elif self._is_gone(rank, beat):
                self._store.set("lost", self._died(rank, json.loads(beat)))
        if self._store.check(["lost"]):
            self.lost = self._store.get("lost").decode()
        if self._alarm_key and self.alarm is None and self._store.check([self._alarm_key]):
            self.alarm = self._store.get(self._alarm_key).decode()

    def wait_for_lost(self, timeout_s: float) -> None:
        """Raise as soon as a rank is known to be lost; return when the time is over."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self._look_for_the_dead()
            self.check()
            time.sleep(BEAT_S / 10)

    def _look_for_the_dead(self) -> None:
        for rank, beat in enumerate(self._store.multi_get([f"heartbeat/{r}" for r in range(self.size)])):
            if self._is_gone(rank, beat):
                self.lost = self._died(rank, json.loads(beat))
                return

    def _is_gone(self, rank: int, beat: bytes) -> bool:
        """Tell whether a rank of this host has no process any more; on other hosts only silence tells."""
        *host, pid = json.loads(beat)["process"]
        # A rank that leaves normally says so before its process ends.
        return host == [*_host()] and not _lives(pid) and not self._store.check([f"left/{rank}"])

    def _died(self, rank: int, beat: dict[str, Any]) -> str:
        return f"rank {rank} of {self.size} died, last seen at: {beat.get('at')}"

    def check(self) -> None:
        """Raise if a rank is known to be lost."""
        if self.lost is not None:
            raise PeerLostError(self.lost)
