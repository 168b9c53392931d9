"""What a launcher is given, and the launchers there are."""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hvdlm.errors import ConfigError
from hvdlm.launchers.hosts import Host, Slot
from hvdlm.launchers.ssh import Ssh, python_command
from hvdlm.secrets import secret_arguments, secret_values

__all__ = ["LAUNCHERS", "JobSpec", "Launcher", "cores", "get_launcher", "supervisor_command"]


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """One job, complete: a launcher needs nothing else."""

    command: tuple[str, ...]
    """The program each worker runs, and its arguments."""
    num_proc: int
    """Number of workers."""
    hosts: tuple[Host, ...]
    """Where they run."""
    slots: tuple[Slot, ...]
    """The place of each rank; empty where another program decides it."""
    remote: bool = False
    """Whether a host is another machine."""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """The environment of the workers. Not shown: it may hold secrets."""
    run_dir: Path
    """Where logs are written."""
    flags: Mapping[str, Any] = field(default_factory=dict)
    """Flags of horovodrun that were given, by their destination in its parser (``ssh_port``, ``nics``, ...)."""
    ssh_options: tuple[str, ...] = ()
    """Options for ssh, as in ``ssh -o``."""
    pass_env: tuple[str, ...] = ()
    """More variables of the environment that go to other hosts, as patterns."""
    out_of_reach: bool = False
    """Whether supervisors on other hosts have no way to this process (``srun`` starts them): they print through it."""
    verbose: bool = False

    @property
    def ssh(self) -> Ssh:
        """How other hosts are reached."""
        return Ssh(
            port=self.flags.get("ssh_port"),
            identity_file=self.flags.get("ssh_identity_file"),
            options=self.ssh_options,
        )

    @property
    def secrets(self) -> tuple[str, ...]:
        """What is not to be shown."""
        return (*secret_arguments(self.command), *secret_values(self.environment))

    @property
    def logs(self) -> Path:
        """Directory of the per-rank logs."""
        return self.run_dir / "logs"


class Launcher(Protocol):
    """A module of this package that can run a job."""

    def submit(self, spec: JobSpec) -> int:
        """Run a job to its end and return its exit code.

        Raises:
            WorkerFailed: A worker raised, exited with a code other than zero, or was killed.
            LaunchError: The job could not be started.
        """
        ...


LAUNCHERS = {
    "debug": "hvdlm.launchers.debug",
    "elastic": "hvdlm.launchers.elastic",
    "gloo": "hvdlm.launchers.gloo",
    "horovodrun": "hvdlm.launchers.horovodrun",
    "mpi": "hvdlm.launchers.mpi",
    "slurm": "hvdlm.launchers.slurm",
}
"""Name -> module. Modules are imported when they are chosen."""


def get_launcher(name: str) -> Launcher:
    """The launcher of a name.

    Raises:
        ConfigError: There is none; the message lists those there are.
    """
    if name not in LAUNCHERS:
        close = difflib.get_close_matches(name, LAUNCHERS, n=1)
        raise ConfigError(
            f"no launcher {name!r}; the launchers are: {', '.join(sorted(LAUNCHERS))}.",
            hint=f"--launcher {close[0]}" if close else "leave --launcher out to have one chosen",
        )
    module: Any = importlib.import_module(LAUNCHERS[name])
    launcher: Launcher = module.LAUNCHER
    return launcher


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0))


def supervisor_command(
    spec: JobSpec, socket_path: str, *, worker: int | None = None, receive_environment: bool = False
) -> list[str]:
    """The command of one worker's supervisor.

    Args:
        spec: The job.
        socket_path: Where it finds the launcher or its agent, see :func:`hvdlm.wire.socket_path`.
        worker: What it is called; its rank in the environment if None.
        receive_environment: Whether its program's environment comes through the socket.
    """
    command = [*python_command("hvdlm.worker"), "--socket", socket_path]
    command += [] if worker is None else ["--worker", str(worker)]
    command += ["--receive-environment"] if receive_environment else []
    # Another host may not see our disk: then its workers' logs are written by the launcher, which hears them.
    command += ["--logs", str(spec.logs)] if spec.out_of_reach or not spec.remote else []
    command += ["--alone-if-unreachable"] if spec.out_of_reach else []
    for flag in ("max_memory", "nice"):
        command += [f"--{flag.replace('_', '-')}", str(spec.flags[flag])] if flag in spec.flags else []
    return [*command, "--", *spec.command]
