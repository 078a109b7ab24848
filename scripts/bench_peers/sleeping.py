"""mgpu_ddp with a model that only sleeps, so that what is left is the protocol; for scripts/bench protocol.

    sleeping.py FOLDER SECONDS [key=value ...]

Every batch takes SECONDS of sleep. Each rank writes FOLDER/rank<n>.json: how long it was in each gathering, and what
CPU time it took between its first and its last batch.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mgpu_ddp import cli, infer
from mgpu_ddp.distributed.channel import Channel
from mgpu_ddp.inference.predictor import Predictor
from mgpu_ddp.models.build import Model

FOLDER, SECONDS = Path(sys.argv[1]), float(sys.argv[2])
CLASSES = 1000
gathered_s: list[float] = []
clocks: list[tuple[float, float, int]] = []
"""(wall, CPU time, windows gathered) at each batch."""


class Sleeping(Predictor):
    """Predicts nothing, at a steady pace."""

    def __init__(self, _module: nn.Module, _transform: Any, config: Any, _device: torch.device) -> None:
        self.decodes, self.inputs, self._topk = False, None, config.output.topk

    def __call__(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        clocks.append((time.perf_counter(), time.process_time(), len(gathered_s)))
        time.sleep(SECONDS)
        n = len(pixels)
        return {
            "pred": torch.zeros(n, dtype=torch.int32),
            "prob": torch.ones(n),
            "finite": torch.ones(n, dtype=torch.bool),
            "topk_index": torch.zeros(n, self._topk, dtype=torch.int32),
            "topk_prob": torch.zeros(n, self._topk),
        }


class Timed(Channel):
    """Notes how long each gathering took this rank, waiting for others included."""

    def gather(self, window: int, payload: Any) -> list[Any]:
        started = time.perf_counter()
        payloads = super().gather(window, payload)
        gathered_s.append(time.perf_counter() - started)
        return payloads

    def close(self) -> None:
        super().close()
        (first_s, first_cpu_s, before), (last_s, last_cpu_s, after) = clocks[len(clocks) // 4], clocks[-1]
        found = {
            "gathered_s": gathered_s[before:after],
            "windows": after - before,
            "wall_s": last_s - first_s,
            "cpu_s": last_cpu_s - first_cpu_s,
        }
        (FOLDER / f"rank{self._rank}.json").write_text(json.dumps(found))


def no_model(_config: Any, _world: Any) -> Model:
    module = nn.Linear(1, CLASSES)
    return Model(module=module, num_classes=CLASSES, origin="a model that sleeps", class_names=None, preset=None)


if __name__ == "__main__":
    infer.load_model = no_model
    infer.prepare = lambda model, *_args, **_options: model.module
    infer.Predictor = Sleeping
    sys.modules["mgpu_ddp.job.tasks"].Channel = Timed
    del sys.argv[1:3]
    cli.main(infer.infer)
