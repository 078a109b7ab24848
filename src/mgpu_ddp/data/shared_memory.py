"""Anonymous shared memory."""

MAP_NORESERVE = 0x4000
"""Source: mmap(2); Python names it from 3.13 on."""
