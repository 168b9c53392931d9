"""Jobs inside a Slurm allocation: ``srun`` starts a supervised process per worker, over Gloo, without ssh or PMI."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hvdlm.errors import ConfigError, LaunchError
from hvdlm.launchers.base import JobSpec, supervisor_command
from hvdlm.launchers.hosts import Host
from hvdlm.launchers.interfaces import own_network
from hvdlm.launchers.rendezvous import Rendezvous
from hvdlm.launchers.supervise import Job
from hvdlm.network import interfaces

__all__ = ["LAUNCHER", "SlurmLauncher", "allocated_hosts", "expand_counts", "render"]

_INHERITED = re.compile(r"OMPI_COMM_|PMIX_|PMI_|PRTE_|HOROVOD_(?:RANK|SIZE|LOCAL_|CROSS_|GLOO_RENDEZVOUS|HOSTNAME)")
# srun reads its own flags from the environment too; those of the batch script are of the job, not of this step.
_OF_SRUN = re.compile(r"SLURM_(?:EXPORT_ENV|HOSTFILE|DISTRIBUTION|NTASKS_PER_NODE|CPU_BIND|MEM_PER_|GPUS|TRES_|UMASK)")


def expand_counts(text: str) -> tuple[int, ...]:
    """Tasks of each node from Slurm's short form.

    >>> expand_counts("2(x3),1")
    (2, 2, 2, 1)

    Raises:
        LaunchError: The text is of another form.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise LaunchError(f"Slurm says {text!r} for the tasks of each node, which is of no form known here.")
        counts += [int(match[1])] * int(match[2] or 1)
    return tuple(counts)


def allocated_hosts(environment: Mapping[str, str]) -> tuple[Host, ...]:
    """The nodes of the allocation this process is in, each with its tasks.

    Args:
        environment: The environment of the batch script, or of a shell that ``salloc`` started.

    Raises:
        ConfigError: This is not inside an allocation.
        LaunchError: Slurm cannot say its nodes.
    """
    nodes = environment.get("SLURM_JOB_NODELIST", "")
    tasks = environment.get("SLURM_TASKS_PER_NODE", "")
    if not nodes or not tasks:
        raise ConfigError(
            "--launcher slurm works inside an allocation of Slurm, and this is none.",
            hint="hvdlm submit slurm -np 2 train.py, or first: salloc -n 2",
        )
    try:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodes],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(f"scontrol cannot be asked for the nodes: {error}.") from None
    names = listed.stdout.split()
    counts = expand_counts(tasks)
    if listed.returncode or len(names) != len(counts):
        raise LaunchError(f"Slurm says {tasks!r} tasks for the nodes {nodes!r}: {listed.stderr.strip()}")
    return tuple(Host(name, count) for name, count in zip(names, counts, strict=True))


def render(spec: JobSpec, worker: Sequence[str]) -> list[str]:
    """The command line of srun. Where the rendezvous is, and its secret, is in the environment.

    Args:
        spec: The job.
        worker: The command of a worker's supervisor.
    """
    counts = [sum(slot.hostname == host.name for slot in spec.slots) for host in spec.hosts]
    counts = [count for count in counts if count]
    cpus = spec.environment.get("SLURM_CPUS_PER_TASK", "")
    root = str(Path(__file__).resolve().parents[2])
    # -I: the working directory shadows no module.
    start = f"import sys; sys.path.append({root!r}); from hvdlm.launchers.slurm_task import main; main()"
    task = [sys.executable, "-I", "-c", start]
    task += ["--tasks", ",".join(map(str, counts)), "--nics", ",".join(spec.flags.get("nics") or ())]
    return [
        "srun",
        *(f"--ntasks={spec.num_proc}", f"--nodes={len(counts)}", f"--ntasks-per-node={max(counts)}"),
        *((f"--cpus-per-task={cpus}",) if cpus else ()),
        *("--distribution=block", "--export=ALL", "--input=none", "--unbuffered"),
        *("--kill-on-bad-exit=1", "--wait=0"),
        *task,
        "--",
        *worker,
    ]


class SlurmLauncher:
    """Runs static jobs as a step of an allocation."""

    def submit(self, spec: JobSpec) -> int:
        """Run the job to its end; see :class:`hvdlm.launchers.base.Launcher`."""
        one_host = len({slot.hostname for slot in spec.slots}) == 1
        address = own_network(spec.flags.get("nics") or (), interfaces(), outside=not one_host).address
        environment = {
            name: value
            for name, value in spec.environment.items()
            if not _INHERITED.match(name) and not _OF_SRUN.match(name)
        }
        server = Rendezvous(address, spec.slots)
        try:
            with Job(spec) as job:
                worker = supervisor_command(spec, job.socket_path)
                job.start_starter("srun", render(spec, worker), environment | server.environment())
                server.start()
                return job.wait()
        finally:
            server.close()


LAUNCHER = SlurmLauncher()
