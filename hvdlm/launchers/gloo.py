"""Static jobs over Gloo: a rendezvous server, and one supervised process per worker, on one host or several."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from hvdlm.launchers.base import JobSpec, supervisor_command
from hvdlm.launchers.hosts import Slot
from hvdlm.launchers.interfaces import choose_network
from hvdlm.launchers.rendezvous import Rendezvous
from hvdlm.launchers.supervise import Job
from hvdlm.network import interface_towards, interfaces

__all__ = ["LAUNCHER", "GlooLauncher", "worker_environment"]

_INHERITED = re.compile(r"OMPI_COMM_|PMIX_|PMI_|HOROVOD_(?:RANK|SIZE|LOCAL_|CROSS_|GLOO_RENDEZVOUS|HOSTNAME)")


def worker_environment(
    base: Mapping[str, str], slot: Slot, rendezvous: Mapping[str, str], nics: Sequence[str]
) -> dict[str, str]:
    """The environment in which Horovod finds its place in a Gloo job.

    Args:
        base: The environment of the job.
        slot: The worker's place.
        rendezvous: See :meth:`hvdlm.launchers.rendezvous.Rendezvous.environment`.
        nics: Network interfaces of the worker's host; Gloo uses the first.
    """
    environment = {name: value for name, value in base.items() if not _INHERITED.match(name)}
    return environment | {
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_GLOO_IFACE": nics[0],
        **rendezvous,
        "HOROVOD_HOSTNAME": slot.hostname,
        "HOROVOD_RANK": str(slot.rank),
        "HOROVOD_SIZE": str(slot.size),
        "HOROVOD_LOCAL_RANK": str(slot.local_rank),
        "HOROVOD_LOCAL_SIZE": str(slot.local_size),
        "HOROVOD_CROSS_RANK": str(slot.cross_rank),
        "HOROVOD_CROSS_SIZE": str(slot.cross_size),
        "NCCL_SOCKET_IFNAME": ",".join(nics),
    }


class GlooLauncher:
    """Runs static jobs over Gloo."""

    def submit(self, spec: JobSpec) -> int:
        """Run the job to its end; see :class:`hvdlm.launchers.base.Launcher`."""
        servers: list[Rendezvous] = []
        with Job(spec) as job:

            def start() -> None:
                others = {host: facts["interfaces"] for host, facts in job.facts.items()}
                towards = interface_towards(next(iter(others))) if others else None
                network = choose_network(spec.flags.get("nics") or (), interfaces(), others, towards)
                server = Rendezvous(network.address, spec.slots)
                servers.append(server)
                for slot in spec.slots:
                    nics = network.others.get(slot.hostname, network.here)
                    environment = worker_environment(spec.environment, slot, server.environment(), nics)
                    command = supervisor_command(spec, job.socket_path, worker=slot.rank)
                    job.start_worker(slot.rank, slot.hostname, command, environment)
                # Only now: starting processes is safer while there is no other thread. Until then workers queue up.
                server.start()

            try:
                job.when_reached(start)
                return job.wait()
            finally:
                for server in servers:
                    server.close()


LAUNCHER = GlooLauncher()
