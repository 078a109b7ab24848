"""The launcher's store: waiting for keys of it while every rank lives."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import Store  # type: ignore[attr-defined]

from mgpu_ddp.distributed.heartbeat import Heartbeat
from mgpu_ddp.errors import PeerLostError

POLL_S = 0.05
RANKS_PER_POLL = 256
"""Ranks that may ask a store every `POLL_S`. More of them ask less often, or it would do nothing but answer."""


def wait_for_keys(store: Store, keys: list[str], heartbeat: Heartbeat) -> None:
    """Wait until the keys are there.

    Raises:
        PeerLostError: a rank is lost meanwhile.
    """
    # Asking again rather than `store.wait`: each time that runs into its timeout, torch prints a warning.
    pause_s, longest_s = 0.001, POLL_S * max(1, heartbeat.size / RANKS_PER_POLL)
    while not store.check(keys):
        heartbeat.check()
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, longest_s)


@contextmanager
def store_must_answer() -> Iterator[None]:
    """Raise `PeerLostError` for a store that is gone: the process that hosts it died, rank 0 or the launcher."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError(f"the store on rank 0 does not answer ({str(error).splitlines()[0]})") from error
