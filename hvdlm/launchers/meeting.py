"""How workers that another launcher started find each other over Gloo: what ``hvdlm run`` does for those of its own."""

from __future__ import annotations

import atexit
import json
import socket
from collections.abc import Callable, Sequence

from hvdlm.errors import ConfigError, LaunchError
from hvdlm.launchers.gloo import worker_environment
from hvdlm.launchers.interfaces import own_network
from hvdlm.launchers.places import Place, slots_of
from hvdlm.launchers.rendezvous import Rendezvous, given_rendezvous
from hvdlm.network import interface_towards, interfaces

__all__ = ["meet"]


def meet(allgather: Callable[[str], list[str]], rank: int, nics: Sequence[str] = ()) -> dict[str, str]:
    """The variables with which Horovod finds the others. Rank 0 keeps the job's rendezvous until its process ends.

    Args:
        allgather: Tells all processes what each says; the launcher's or MPI's.
        rank: This process's.
        nics: The interfaces to use; if none, loopback on one host, else the one the hosts reach each other by.

    Raises:
        ConfigError: An interface is not there.
        LaunchError: Rank 0 could not open the rendezvous, or cannot be reached.
    """
    slots = slots_of([Place(host, 0) for host in allgather(socket.gethostname())])
    said: dict[str, str] = {}
    if rank == 0:
        try:
            one_host = len({slot.hostname for slot in slots}) == 1
            store = Rendezvous(own_network(nics, interfaces(), outside=not one_host).address, slots)
            store.start()
            atexit.register(store.close)
            said = store.environment()
        except (ConfigError, OSError) as error:  # the others wait for an answer
            said = {"error": str(error)}
    found = json.loads(allgather(json.dumps(said))[0])
    if "error" in found:
        raise LaunchError(f"rank 0 could not open the job's rendezvous: {found['error']}")
    rendezvous, address = given_rendezvous(found)
    towards = interface_towards(address)
    chosen = list(nics) or ([towards] if towards else [])
    if not chosen:
        raise LaunchError(f"{address} cannot be reached from here.", hint="HOROVOD_GLOO_IFACE=NAME")
    return worker_environment({}, slots[rank], rendezvous, chosen)
