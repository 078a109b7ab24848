"""On real GPUs: the rows of the CPU within the precision's tolerance, and the same bits on one GPU and on two."""

import os
import signal
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pyarrow as pa
import pytest
import torch

from mgpu_ddp.notebook import send
from tests.support.runs import assert_proved, make_images, read_table
from tests.support.starting import committed_rows, finish, python_m, run, started, torchrun, wait_until, worker_pids

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(500)]
GPUS = torch.cuda.device_count()
COUNT = 301
if GPUS == 0:
    pytest.skip("needs a CUDA device", allow_module_level=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ResNet18 over real JPEGs: on the CPU, and on one GPU in every precision."""
    root = tmp_path_factory.mktemp("gpu")
    make_images(root / "images", COUNT)
    cpu = run(python_m(*settings(root, "cpu", "fp32"), "runtime.device=cpu"), root)
    assert cpu.code == 0, cpu.err
    for precision in ("fp32", "tf32", "bf16", "fp16"):
        for decode in ("cpu", "gpu"):
            name = f"one-{precision}-{decode}"
            one = run(python_m(*settings(root, name, precision), f"runtime.decode={decode}"), root)
            assert one.code == 0, one.err
            assert one.summary["device"] == torch.cuda.get_device_name(0)
    return root


def settings(root: Path, name: str, precision: str) -> list[str]:
    fields = "output.fields=[topk,logits,embedding]"
    images = root / "images"
    data = ["data=folder", f"data.root={images}", "model.weights=null"]
    return [*data, f"runtime.precision={precision}", fields, f"output.dir={root / name}"]


def column(table: pa.Table, name: str) -> Any:
    return np.stack(table[name].to_numpy())


@pytest.mark.parametrize("decode", ["cpu", "gpu"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("tf32", 5e-3), ("fp16", 5e-3), ("bf16", 3e-2)])
def test_one_gpu_gives_the_rows_of_the_cpu(runs: Path, precision: str, tolerance: float, decode: str) -> None:
    cpu, gpu = read_table(runs / "cpu"), read_table(runs / f"one-{precision}-{decode}")
    assert_proved(runs / f"one-{precision}-{decode}", COUNT)
    assert cpu["path"].equals(gpu["path"])
    assert cpu["label"].equals(gpu["label"])
    ours, theirs = (np.exp(column(t, "logits").astype(np.float64)) for t in (gpu, cpu))
    worst = np.abs(ours / ours.sum(1, keepdims=True) - theirs / theirs.sum(1, keepdims=True)).max()
    print(f"{precision}, decoded on the {decode}: largest difference of a probability {worst:.2e}")
    # Two decoders of one JPEG differ by a level here and there.
    assert worst < max(tolerance, 5e-3 if decode == "gpu" else 0)


@pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_two_gpus_give_the_bits_of_one(runs: Path, precision: str) -> None:
    two = run(torchrun(2, *settings(runs, f"two-{precision}", precision)), runs)
    assert two.code == 0, two.err
    assert_proved(runs / f"two-{precision}", COUNT)
    assert read_table(runs / f"one-{precision}-gpu").equals(read_table(runs / f"two-{precision}"))


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("fp16", 1e-2), ("bf16", 1e-1)])
def test_another_batch_size_gives_the_same_classes_within_rounding(
    runs: Path, precision: str, tolerance: float
) -> None:
    other = run(python_m(*settings(runs, f"batch-{precision}", precision), "batch_size=8"), runs)
    assert other.code == 0, other.err
    ours, theirs = (column(read_table(runs / n), "logits") for n in (f"one-{precision}-gpu", f"batch-{precision}"))
    worst = float(np.abs(ours - theirs).max())
    print(f"{precision}: largest difference of a logit between batches of 32 and 8 {worst:.2e}")
    assert worst < tolerance
    best = np.sort(ours, axis=1)
    clear = best[:, -1] - best[:, -2] > 2 * worst
    assert clear.any()
    assert (ours.argmax(1) == theirs.argmax(1))[clear].all()


def test_a_killed_gpu_job_resumes_to_the_same_bits(runs: Path) -> None:
    # Many small batches, so that the kill falls into the middle.
    many = [*settings(runs, "killed", "fp16"), "batch_size=1", "output.commit_every=10"]
    with started(torchrun(min(GPUS, 2), *many), runs) as launcher:
        wait_until(lambda: committed_rows(runs / "killed") > 0, launcher)
        os.kill(worker_pids(launcher.pid)[0], signal.SIGKILL)
        assert finish(launcher, runs, 0).code == 1
    assert committed_rows(runs / "killed") < COUNT
    again = run(python_m(*many), runs)
    assert again.code == 0, again.err
    whole = run(python_m(*settings(runs, "whole", "fp16"), "batch_size=1"), runs)
    assert whole.code == 0, whole.err
    assert read_table(runs / "killed").equals(read_table(runs / "whole"))


def test_more_processes_than_gpus_are_refused(tmp_path: Path) -> None:
    ended = run(torchrun(GPUS + 1, "runtime.device=cuda"), tmp_path)
    assert ended.code == 1
    line = f"{GPUS + 1} processes on {os.uname().nodename} need a GPU each, and there are {GPUS}. Start at most {GPUS}"
    assert ended.err.count(line) == 1


def test_a_model_that_was_trained_on_a_gpu_is_sent_to_the_cpu_of_each_rank(tmp_path: Path) -> None:
    """A tensor of CUDA would make a context on this process's GPU in every rank, before it has chosen its own."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)).cuda()
    send({"model": lambda: net}, tmp_path / "functions")
    sent = cloudpickle.loads((tmp_path / "functions").read_bytes())["model"]().state_dict()
    assert {tensor.device.type for tensor in sent.values()} == {"cpu"}
    assert all(torch.equal(sent[name], tensor.cpu()) for name, tensor in net.state_dict().items())
