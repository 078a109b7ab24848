"""The values of everything that may be `auto`: decided once for a job, logged, and kept in its manifest."""

from dataclasses import dataclass

from mgpu_ddp.preprocess.transform import Transform


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """A job's choices, each a plain value."""

    precision: str
    """fp32, tf32, bf16 or fp16."""
    decode: str
    """gpu, exact or cpu."""
    compile: str
    """on or off."""
    workers: int
    """Loader workers of this rank."""
    collect: str
    """gather or shards."""
    batch_size: int
    transform: Transform
