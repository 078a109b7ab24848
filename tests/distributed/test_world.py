"""What a process makes of its surroundings when it joins the others."""

import os
import subprocess
import sys


def test_a_process_asks_for_all_connections_to_its_gpu_whatever_the_shell_says() -> None:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    code = f"import os; from mgpu_ddp.distributed.world import join, leave; leave(join()); print(os.environ[{name!r}])"
    env = os.environ | {name: "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["32"]
