"""The windows of one job through gloo, for its collecting thread."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from mgpu_ddp.distributed.heartbeat import BEAT_S
from mgpu_ddp.distributed.store import store_must_answer, wait_for_keys
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import PeerLostError

NAMING_S = 5.0
"""How long a rank that has noticed a loss waits to learn which rank was lost."""


class Channel:
    """A gloo group and a store client of the collecting thread's own.

    Two threads on one group corrupt each other's messages. Collective: every rank opens and closes it.
    """

    def __init__(self, world: World, job: str, timeout_s: float) -> None:
        self._heartbeat, self._size, self._rank = world.heartbeat, world.size, world.rank
        self._store = PrefixStore(f"channel/{job}", world.link.store.clone())
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def gather(self, window: int, payload: Any) -> list[Any]:
        """Give every rank the payloads of all ranks for one window.

        The collective starts only once every rank has posted the window, so a slow rank is waited for while it
        lives and none is ever stuck inside the collective for it.

        Raises:
            PeerLostError: a rank died or fell silent.
        """
        with store_must_answer():
            if self._store.add(f"posted/{window}", 1) == self._size:
                self._store.set(f"go/{window}", "1")
                # Whoever posted this window has left the one before.
                for key in (f"posted/{window - 1}", f"go/{window - 1}"):
                    self._store.delete_key(key)
            wait_for_keys(self._store, [f"go/{window}"], self._heartbeat)
        payloads: list[Any] = [None] * self._size
        with self._naming_lost(window):
            dist.all_gather_object(payloads, payload, group=self._group)
        return payloads

    def gather_on_first(self, window: int, value: Any) -> list[Any] | None:
        """Give rank 0 the large values of all ranks, right after they have gathered the window.

        Raises:
            PeerLostError: a rank died.
        """
        values: list[Any] | None = [None] * self._size if self._rank == 0 else None
        with self._naming_lost(window):
            dist.gather_object(value, values, dst=0, group=self._group)
        return values

    @contextmanager
    def _naming_lost(self, window: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            first = str(error).splitlines()[0].partition(". ")[0]
            # The heartbeat knows which: at once if its process is gone, soon if it hangs.
            self._heartbeat.wait_for_lost(NAMING_S if "Timed out" in first else BEAT_S)
            raise PeerLostError(f"a rank was lost while gathering window {window} ({first})") from error

    def close(self) -> None:
        """Give the group back. Collective: every rank calls this."""
        dist.destroy_process_group(self._group)
