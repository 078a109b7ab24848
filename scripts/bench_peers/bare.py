"""The model and nothing else: ResNet18 in channels_last over random batches; prints one JSON line.

Without options it is the loop anybody would write, with torch's own threads. `--fold` folds the batch norms
first, and `--pool` runs one batch in each thread instead of splitting every batch over all threads: together they
are what mgpu_ddp runs on a CPU, and so the ceiling of its rate there.
"""

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torchvision


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--fold", action="store_true")
    parser.add_argument("--pool", action="store_true")
    args = parser.parse_args()

    model = torchvision.models.resnet18().eval()
    if args.fold:
        from torch.fx.experimental.optimization import fuse

        model = fuse(model)
    model = model.to(memory_format=torch.channels_last)
    batch = torch.rand(args.batch_size, 3, 224, 224).to(memory_format=torch.channels_last)
    steps = -(-args.images // args.batch_size)
    if args.pool:
        with ThreadPoolExecutor(args.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            # Gradient mode belongs to a thread.
            step = torch.inference_mode()(model)
            list(pool.map(step, [batch] * args.threads))
            started = time.perf_counter()
            for _ in pool.map(step, [batch] * steps):
                pass
            seconds = time.perf_counter() - started
    else:
        torch.set_num_threads(args.threads)
        model(batch)
        started = time.perf_counter()
        for _ in range(steps):
            model(batch)
        seconds = time.perf_counter() - started
    print(json.dumps({"images_per_s": steps * args.batch_size / seconds, "threads": args.threads}))


if __name__ == "__main__":
    main()
