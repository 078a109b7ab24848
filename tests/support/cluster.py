"""A real SLURM cluster on this machine: munged, slurmctld and three slurmd, as this user, in one folder."""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NODES = 3
DAEMONS = ("munged", "slurmctld", "slurmd")
TIMEOUT_S = 120
KILL_WAIT_S = 30

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
ReturnToService=2
SlurmdParameters=config_overrides
KillWait={kill_wait}
MinJobAge=600
MpiDefault=none
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port={first}-{last} CPUs=8 RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def missing() -> str:
    """Name the daemons of a cluster that this machine lacks; empty if it has all."""
    return ", ".join(name for name in DAEMONS if shutil.which(name, path=_PATH) is None)


_PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"


@dataclass
class Cluster:
    """The folder with the daemons' files, and a way to run SLURM's commands against them."""

    folder: Path
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environ(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        return kept | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _PATH}

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """Run a command of SLURM's and return what it says."""
        done = subprocess.run(command, env=self.environ, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, *command: str, cwd: Path) -> int:
        """Submit a batch job and return its number."""
        return int(self.run("sbatch", "--parsable", *command, cwd=cwd))

    def job(self, number: int | str) -> dict[str, str]:
        """Ask the controller for the properties of a job."""
        text = self.run("scontrol", "show", "job", "-o", str(number)).splitlines()[0]
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> Any:
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            assert time.monotonic() < deadline, f"the condition never came true; see {self.folder}"
            time.sleep(0.1)
        return value

    def wait(self, number: int | str, timeout_s: float = TIMEOUT_S) -> dict[str, str]:
        """Wait until a job has left the queue, and return what is known of it."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return self.wait_for(lambda: (job := self.job(number))["JobState"] in ended and job, timeout_s)

    def _start(self, *command: str) -> None:
        name = f"{Path(command[0]).name}{len(self.daemons)}"
        with (self.folder / f"{name}.out").open("wb") as out:
            self.daemons.append(
                subprocess.Popen(command, env=self.environ, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
            )

    def start(self) -> None:
        """Write the configuration, start the daemons and wait until all nodes are idle."""
        first, user = _free_ports(NODES + 1), os.environ.get("USER") or _user()
        host = socket.gethostname().split(".")[0]
        text = CONFIGURATION.format(
            host=host,
            port=first + NODES,
            user=user,
            folder=self.folder,
            kill_wait=KILL_WAIT_S,
            nodes=NODES,
            first=first,
            last=first + NODES - 1,
        )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("pid", "log", "seed")]
        options = ["--foreground", "--force", f"--socket={self.folder}/munge.socket", f"--key-file={key}", *files]
        self._start(_which("munged"), *options)
        self.wait_for((self.folder / "munge.socket").exists)
        self._start(_which("slurmctld"), "-D", "-f", str(self.folder / "slurm.conf"))
        for node in range(1, NODES + 1):
            self._start(_which("slurmd"), "-D", "-N", f"n{node}", "-f", str(self.folder / "slurm.conf"))
        self.wait_for(lambda: self._idle() == NODES)

    def _idle(self) -> int:
        """How many nodes could take a job now."""
        assert all(daemon.poll() is None for daemon in self.daemons), f"a daemon died; see {self.folder}"
        done = subprocess.run(["sinfo", "-h", "-N", "-o", "%t"], env=self.environ, capture_output=True, text=True)
        return done.stdout.split().count("idle")

    def stop(self) -> None:
        """End all jobs, then exactly the daemons that were started."""
        with suppress(Exception):
            self.run("scancel", "--signal=KILL", "--full", "--user", _user())
            self.run("scancel", "--user", _user())
            self.wait_for(lambda: not self.run("squeue", "-h"), 60)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def status_of(run_dir: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((run_dir / "status.json").read_text()))
    except FileNotFoundError:
        return {}


def _which(name: str) -> str:
    path = shutil.which(name, path=_PATH)
    assert path is not None
    return path


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _free_ports(count: int) -> int:
    """The first of several ports in a row that nobody listens on."""
    for first in range(27000, 29000, count):
        sockets = []
        try:
            for port in range(first, first + count):
                listening = socket.socket()
                sockets.append(listening)
                listening.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
        finally:
            for listening in sockets:
                listening.close()
    raise AssertionError("no free ports")
