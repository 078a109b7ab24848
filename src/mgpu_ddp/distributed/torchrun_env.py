"""The variables that torchrun sets for each worker, and others who start torch's ranks set as well.

Source: https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables.
"""

from mgpu_ddp.distributed.place import Environ, Place, numbers, refuse_missing
from mgpu_ddp.errors import UsageError

REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ALONE = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "0"}
"""May be left out by those who start one rank on each host."""
REMEDY = "Start by torchrun, which sets all of them, or unset it."


def read_place(environ: Environ) -> Place | None:
    """This process as a worker of torchrun; None where neither `RANK` nor `WORLD_SIZE` is set.

    Raises:
        UsageError: some of the variables are missing, or do not fit together.
    """
    there = next((name for name in REQUIRED[:2] if name in environ), None)
    if there is None:
        return None
    refuse_missing(environ, REQUIRED, there, REMEDY)
    names = ("RANK", "WORLD_SIZE", "MASTER_PORT", *ALONE)
    rank, size, port, local_rank, local_size, attempt = numbers({**ALONE, **environ}, names, REMEDY)
    if rank >= size:
        raise UsageError(f"RANK must be below WORLD_SIZE={size}, got {rank}. {REMEDY}")
    return Place(
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        attempt=attempt,
        master=(environ["MASTER_ADDR"], port),
    )
