"""Fixtures of all tests: real images, a world of one process, and a process in which Triton interprets."""

import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from mgpu_ddp.config.compose import register
from mgpu_ddp.distributed.world import World, join, leave
from mgpu_ddp.models.lazy_dynamo import import_torchvision
from tests.support.runs import make_images

# Whoever runs the tests may have had it ignored, as nohup does, and processes inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Else each of the processes below compiles all of torch anew, for a second of CPU.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# As jobs do, before a test imports it by itself.
import_torchvision()


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 41 images in three classes."""
    root = tmp_path_factory.mktemp("images")
    make_images(root, 41)
    return root


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """This process alone: a process joins once, so all tests share it."""
    alone = join()
    yield alone
    leave(alone)


@pytest.fixture(scope="session")
def registered() -> None:
    """The schema and the resolvers as the job itself registers them."""
    register()


@pytest.fixture(scope="session")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton interprets: it decides that when it is imported."""
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        patch.setenv("TRITON_INTERPRET", "1")
        assert pool.submit(os.getenv, "TRITON_INTERPRET").result() == "1"
        yield pool
