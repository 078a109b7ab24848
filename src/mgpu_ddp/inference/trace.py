"""`runtime.profile`: a trace of some batches of each rank, with named ranges that nsys shows as well.

RUN/profile/rank<n>.json.gz opens in https://ui.perfetto.dev. `nsys profile --trace=cuda,nvtx torchrun ...` (formerly
nvprof) and a trace both want the GPU's counters: one at a time.
"""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from mgpu_ddp.distributed.world import World
from mgpu_ddp.output.atomic_files import replace_bytes

log = logging.getLogger("mgpu_ddp")

STEPS, WARM_UP = 20, 2
"""Batches that are traced, and batches right before them that start the tracer."""
SKIPPED = 10
"""Batches before those, slow because of what happens only once; fewer in a short job."""


class Profile:
    """Traces some batches of this rank."""

    def __init__(self, world: World, folder: Path, num_batches: int) -> None:
        self._path = folder / "profile" / f"rank{world.rank}.json.gz"
        activities = [ProfilerActivity.CPU]
        if world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        skipped = max(0, min(SKIPPED, num_batches - STEPS - WARM_UP))
        self._written = False
        # The tracer writes to stderr what does not concern the user, such as that there is no GPU.
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")
        self._profiler = profile(
            activities=activities,
            schedule=schedule(skip_first=skipped, wait=0, warmup=WARM_UP, active=STEPS, repeat=1),
            on_trace_ready=self._write,
            # JPEGs are decoded, and on the CPU batches predicted, in threads of their own.
            experimental_config=torch._C._profiler._ExperimentalConfig(profile_all_threads=True),
        )

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Trace the block, which calls `step` after each batch."""
        with self._profiler:
            yield
        if not self._written:
            log.warning("runtime.profile: fewer than %d batches per rank leave no trace", WARM_UP + 1)

    def step(self) -> None:
        """Count a batch that is done."""
        self._profiler.step()

    def _write(self, done: "profile") -> None:
        self._path.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / self._path.name
            done.export_chrome_trace(str(trace))
            replace_bytes(self._path, trace.read_bytes())
        self._written = True
        log.info("runtime.profile: %s shows at most %d batches in https://ui.perfetto.dev", self._path, STEPS)


@contextmanager
def named_range(name: str) -> Iterator[None]:
    """Name what happens in the block, in a trace and for nsys."""
    on_gpu = torch.cuda.is_initialized()
    # Outside of a trace it would cost several times what all else here does. torch.autograd._profiler_enabled() is
    # False where a trace covers all threads.
    traced = record_function(name) if torch.autograd.profiler._is_profiler_enabled else nullcontext()
    if on_gpu:
        torch.cuda.nvtx.range_push(name)
    try:
        with traced:
            yield
    finally:
        if on_gpu:
            torch.cuda.nvtx.range_pop()
