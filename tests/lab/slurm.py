"""A real Slurm on this machine: munged, slurmctld and two slurmd with ports of their own, all in one directory."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

__all__ = ["Slurm", "slurm"]

NODES = ("n1", "n2")


@dataclass(frozen=True)
class Slurm:
    """A Slurm that runs."""

    directory: Path
    environment: Mapping[str, str]
    """What its commands need."""
    pids: tuple[int, ...]
    """The daemons."""

    def ask(self, *argv: str) -> str:
        """Run one of Slurm's commands."""
        done = subprocess.run(
            argv, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, (argv, done.stdout, done.stderr)
        return done.stdout

    def steps(self) -> list[int]:
        """Processes of jobs, known by their environment: slurmstepd rewrites its own, and is nobody's child."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                environment = process.environ()
                if environment.get("SLURM_CONF") == self.environment["SLURM_CONF"] and "SLURM_JOB_ID" in environment:
                    found.append(process.pid)
        return found


@contextlib.contextmanager
def slurm(directory: Path) -> Iterator[Slurm]:
    """Bring Slurm up; everything it started is ended afterwards."""
    daemons: list[subprocess.Popen[bytes]] = []
    config = directory / "slurm.conf"
    environment = {"SLURM_CONF": str(config)}
    state = directory / "state"
    state.mkdir()
    directory.chmod(0o755)
    munge = directory / "munge"
    munge.mkdir(mode=0o755)
    (munge / "key").write_bytes(os.urandom(128))
    (munge / "key").chmod(0o400)
    ports = _free_ports(3)
    log = directory / "daemons.log"
    config.write_text(_config(directory, ports))

    def start(*argv: str) -> None:
        with open(log, "ab") as out:
            daemons.append(
                subprocess.Popen(
                    argv, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                    start_new_session=True,
                )
            )  # fmt: skip

    made = None
    try:
        files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        # Its directory lies below /tmp, where others may write: it would refuse without --force.
        start("munged", "--foreground", "--force", f"--socket={munge / 'socket'}", *files)
        _wait((munge / "socket").exists, log)
        start("slurmctld", "-D", "-i")
        for name in NODES:
            start("slurmd", "-D", "-N", name)
        made = Slurm(directory, environment, tuple(daemon.pid for daemon in daemons))
        _wait(lambda: _idle(environment), log)
        yield made
    finally:
        if made is not None:
            for pid in made.steps():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _config(directory: Path, ports: list[int]) -> str:
    host = socket.gethostname().partition(".")[0]
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=2000 State=UNKNOWN"
        for name, port in zip(NODES, ports[1:], strict=True)
    )
    return f"""\
ClusterName=hvdlm{os.getpid()}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/ctld.pid
SlurmdPidFile={directory}/d-%n.pid
SlurmctldLogFile={directory}/ctld.log
SlurmdLogFile={directory}/d-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
SchedulerParameters=sched_min_interval=100000,bf_interval=2
MpiDefault=none
KillWait=5
ReturnToService=2
SlurmdTimeout=60
MessageTimeout=30
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def _idle(environment: Mapping[str, str]) -> bool:
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%t"],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.stdout.split() == ["idle"] * len(NODES)


def _wait(condition: object, log: Path) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def installed() -> bool:
    """Whether Debian's slurm-wlm and munge are here."""
    return all(shutil.which(name) for name in ("munged", "slurmctld", "slurmd", "sbatch"))
