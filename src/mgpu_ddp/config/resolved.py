"""The values of everything that may be `auto`: decided once for a job, logged, and kept in its manifest."""

from dataclasses import dataclass, field

from mgpu_ddp.preprocess.transform import AnyTransform

RANDOM = "random"
"""`Resolved.weights` of a model that was never trained."""
TOGETHER = 256
"""Images that a GPU is given at once, where a batch is not more: of fewer its decoder would idle between the calls."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speedups:
    """How the forward pass is made faster, as far as the module allows it."""

    fold: bool = True
    """Batch norms are folded into convolutions."""
    fuse: bool = False
    """cuDNN applies activations, on a GPU in half precision and channels-last."""
    autocast: bool = False
    """Half precision is that of torch.autocast, around weights in fp32."""
    graphs: bool = True
    """Small batches may replay a CUDA graph: forward does the same for any data."""
    streams: int = 1
    """So many batches run side by side on a GPU: one whose forward waits for the GPU now and then leaves it idle."""

    serial: bool = False
    """One batch after the other: forward keeps something of a batch, which another at the same time would replace."""

    def __str__(self) -> str:
        applied = [name for name in ("fold", "fuse", "autocast", "graphs") if getattr(self, name)]
        applied += [f"{self.streams} streams"] if self.streams > 1 else []
        applied += ["one batch at a time"] if self.serial else []
        return ", ".join(applied) or "as it is"


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """A job's choices, each a plain value."""

    precision: str
    """fp32, tf32, bf16 or fp16."""
    decode: str
    """gpu, exact, cpu or scaled."""
    compile: str
    """on or off."""
    workers: int
    """Loader workers of this rank."""
    collect: str
    """gather or shards."""
    batch_size: int
    transform: AnyTransform
    speedups: Speedups = field(default_factory=Speedups)
    weights: str | None = None
    """`RANDOM`, the name of the weights or the path of the checkpoint; None where the script's model has its own."""

    @property
    def on_gpu(self) -> bool:
        """JPEGs are decoded on the GPU."""
        return is_on_gpu(self.decode)

    @property
    def batches_together(self) -> int:
        """How many batches are loaded, and their input made, as one."""
        return max(1, TOGETHER // self.batch_size) if self.on_gpu else 1

    @property
    def rows_together(self) -> int:
        """The rows of these batches, padding included."""
        return self.batch_size * self.batches_together


def is_on_gpu(decode: str) -> bool:
    return decode in ("gpu", "exact")
