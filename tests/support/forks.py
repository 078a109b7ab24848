"""One process that has imported everything, from which commands and ranks are forked in milliseconds.

It has one thread, no CUDA and no process group, and asserts that before each fork: what is forked is then as good as
a process that was started. It ends with the tests, and what it forked ends with it.
"""

import atexit
import functools
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRELOADED = (
    *("mgpu_ddp.infer", "mgpu_ddp.launch", "mgpu_ddp.merge", "mgpu_ddp.report", "tests.support.worlds"),
    *("torchvision.models", "torchvision.datasets", "torch.distributed.run", "torch.utils.flop_counter"),
    *("pyarrow.parquet", "hydra.main", "hydra._internal.hydra", "PIL.BmpImagePlugin"),
    *("jinja2", "matplotlib.figure", "pytest"),
)
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
"""Read once, by libraries as they are loaded."""
NUMBER = struct.Struct("i")


@dataclass(frozen=True, kw_only=True)
class Order:
    """The work of a forked process, and its surroundings."""

    pickled: bytes
    """A function and its arguments; only the forked process looks into it."""
    cwd: Path
    environ: dict[str, str]


class Forked:
    """A forked process, by the part of Popen's interface that tests use."""

    def __init__(self, order: Order) -> None:
        self._told, tell = os.pipe()
        self.returncode: int | None = None
        socket.send_fds(_server(), [pickle.dumps(order)], [tell])
        os.close(tell)
        self.pid = self._read()

    def _read(self) -> int:
        number = os.read(self._told, NUMBER.size)
        assert number, "the preloaded process has ended; its reason is on stderr"
        return int(NUMBER.unpack(number)[0])

    def poll(self) -> int | None:
        """The exit code, or minus the signal's number; None while the process lives."""
        if self.returncode is None and select.select([self._told], [], [], 0)[0]:
            self.returncode = self._read()
            os.close(self._told)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not select.select([self._told], [], [], timeout)[0]:
            assert timeout is not None
            raise subprocess.TimeoutExpired(f"forked process {self.pid}", timeout)
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fork(function: Callable[..., Any], *arguments: Any, cwd: Path, **environ: str) -> Forked:
    """Call a function of a module in a process of its own; its output is appended to files in its working folder."""
    return Forked(Order(pickled=pickle.dumps((function, arguments)), cwd=cwd, environ=os.environ | environ))


@functools.cache
def _server() -> socket.socket:
    """Start the preloaded process, and return the socket that takes orders. It leaves when that is closed."""
    mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.support.forks", str(its.fileno())]
    process = subprocess.Popen(
        command, cwd=Path(__file__).parents[2], env=os.environ | ONE_THREAD, pass_fds=[its.fileno()]
    )
    its.close()

    def end() -> None:
        mine.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            # A process that outlives the tests holds a copy of the socket.
            process.kill()
            process.wait()

    atexit.register(end)
    return mine


def _serve(orders: socket.socket) -> None:
    """Fork for each order, and report each exit code to the process that asked."""
    lives: dict[int, tuple[int, int]] = {}
    while True:
        for ready in select.select([orders, *lives], [], [])[0]:
            if ready is orders:
                message, files, *_ = socket.recv_fds(orders, 1 << 20, 1)
                if not message:
                    return
                (tell,) = files
                _assert_as_good_as_new()
                pid = os.fork()
                if pid == 0:
                    orders.close()
                    for exited, (_, told) in lives.items():
                        os.close(exited)
                        os.close(told)
                    os.close(tell)
                    _do(pickle.loads(message))
                os.write(tell, NUMBER.pack(pid))
                lives[os.pidfd_open(pid)] = (pid, tell)
            else:
                pid, tell = lives.pop(ready)
                os.close(ready)
                os.write(tell, NUMBER.pack(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
                os.close(tell)


def _assert_as_good_as_new() -> None:
    import torch

    assert len(os.listdir("/proc/self/task")) == 1, "a fork has none of the other threads, but their locks"
    assert not torch.cuda.is_initialized(), "CUDA does not survive a fork"
    assert not torch.distributed.is_initialized(), "a process group belongs to one process"


def _do(order: Order) -> None:
    """Be a process of its own from here on."""
    from mgpu_ddp.distributed.signals import die_with_parent

    code = 1
    try:
        os.setsid()
        die_with_parent(os.getppid())
        os.chdir(order.cwd)
        for number, (name, mode) in enumerate(((os.devnull, "r"), ("stdout.txt", "a"), ("stderr.txt", "a"))):
            with open(name, mode) as file:
                os.dup2(file.fileno(), number)
        os.environ.clear()
        os.environ.update(order.environ)
        function, arguments = pickle.loads(order.pickled)
        function(*arguments)
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    import gc
    import importlib

    from mgpu_ddp.models.lazy_dynamo import import_torchvision

    # As jobs do, before another module imports it by itself.
    import_torchvision()
    for module in PRELOADED:
        importlib.import_module(module)
    # The garbage collector does not touch what is here now, so forked processes share its memory.
    gc.freeze()
    _serve(socket.socket(fileno=int(sys.argv[1])))
    # Without the interpreter's ending, in which Triton prints a list of its leaks.
    os._exit(0)
