"""One task of ``srun``: works out its place among the workers, and becomes the supervisor of one."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Mapping, Sequence

from hvdlm.errors import HvdlmError, LaunchError
from hvdlm.launchers.gloo import worker_environment
from hvdlm.launchers.hosts import Host, Slot, assign
from hvdlm.launchers.rendezvous import given_rendezvous
from hvdlm.network import interface_towards

__all__ = ["main", "place"]


def place(environment: Mapping[str, str], counts: Sequence[int]) -> Slot:
    """This task's place.

    Args:
        environment: What ``srun`` set.
        counts: Workers on each node, as the launcher planned them.

    Raises:
        LaunchError: Slurm put the task elsewhere.
    """
    rank, node, local = (int(environment[f"SLURM_{name}"]) for name in ("PROCID", "NODEID", "LOCALID"))
    name = environment.get("SLURMD_NODENAME") or socket.gethostname()
    hosts = [Host(name if index == node else f"node-{index}", count) for index, count in enumerate(counts)]
    slot = assign(hosts, sum(counts))[rank]
    if (slot.hostname, slot.local_rank) != (name, local):
        raise LaunchError(
            f"Slurm put task {rank} on node {node} as its number {local}; planned were {list(counts)} on the nodes.",
            hint="give --ntasks and --ntasks-per-node for the whole allocation",
        )
    return slot


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``--tasks N,N --nics NAMES -- SUPERVISOR ...`` in place of this process."""
    parser = argparse.ArgumentParser(prog="hvdlm-slurm-task", description="Start one worker of a Slurm step.")
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--nics", default="")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    try:
        slot = place(os.environ, [int(count) for count in args.tasks.split(",")])
        rendezvous, address = given_rendezvous(os.environ)
        towards = interface_towards(address)
        nics = args.nics.split(",") if args.nics else [towards] if towards else []
        if not nics:
            raise LaunchError(f"{address} cannot be reached from here.", hint="--network-interfaces NAME")
    except HvdlmError as error:
        sys.exit(f"hvdlm: {error}")
    os.execve(command[0], command, worker_environment(os.environ, slot, rendezvous, nics))
