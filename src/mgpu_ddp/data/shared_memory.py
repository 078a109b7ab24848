"""Memory that a process shares with those it forks."""

import mmap

MAP_NORESERVE = 0x4000
"""Source: mmap(2); Python names it from 3.13 on."""


def allocate(num_bytes: int) -> mmap.mmap:
    """Map shared memory: zeros, of which only pages that are written to take space.

    It is anonymous, so that it does not depend on the size of /dev/shm, which containers keep small.
    """
    return mmap.mmap(-1, max(num_bytes, 1), mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
