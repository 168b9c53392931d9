"""What runs on Dask workers: the rendezvous of a job on the first one, and a rank on each."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from hvdlm.clusters.child import Outcome, run_child
from hvdlm.errors import LaunchError
from hvdlm.launchers.gloo import worker_environment
from hvdlm.launchers.hosts import Slot
from hvdlm.launchers.interfaces import own_network
from hvdlm.launchers.rendezvous import Rendezvous, given_rendezvous
from hvdlm.network import interface_towards, interfaces

__all__ = ["run_rank", "start_store", "stop_store"]

_stores: dict[str, Rendezvous] = {}


def _towards(address: str, interface: str | None) -> str:
    found = interface or interface_towards(address)
    if found is None:
        raise LaunchError(f"{address} cannot be reached from here.", hint='network_interface="eth0"')
    return found


def start_store(job: str, host: str, slots: Sequence[Slot], interface: str | None) -> dict[str, str]:
    """Start the rendezvous of a job in this Dask worker; returns the variables that lead to it.

    Args:
        job: Its name.
        host: The address this Dask worker is known by.
        slots: The place of each rank.
        interface: The interface to listen at; the one that has ``host`` if None.
    """
    address = own_network([_towards(host, interface)], interfaces()).address
    store = _stores[job] = Rendezvous(address, slots)
    store.start()
    return store.environment()


def stop_store(job: str) -> None:
    """End the rendezvous of a job."""
    store = _stores.pop(job, None)
    if store is not None:
        store.close()


def run_rank(
    payload: bytes,
    slot: Slot,
    rendezvous: Mapping[str, str],
    interface: str | None,
    job: str,
    secrets: Sequence[str] = (),
) -> Outcome:
    """Run one rank in a process of its own, to its end.

    Args:
        payload: The pickled call.
        slot: The rank's place.
        rendezvous: What :func:`start_store` returned.
        interface: The network interface; the one towards the rendezvous if None.
        job: The job's name: of the topic its output goes to, and of the event that ends it.
        secrets: What its output does not show.
    """
    import distributed

    worker = distributed.get_worker()
    stop = distributed.Event(job)
    nics = [_towards(given_rendezvous(rendezvous)[1], interface)]
    environment = worker_environment(os.environ, slot, rendezvous, nics)
    environment |= {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.setdefault("HVDLM_PROGRESS", "lines")
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // slot.local_size)))
    return run_child(
        payload,
        environment,
        lambda line: worker.log_event(job, {"rank": slot.rank, "line": line}),
        stop.is_set,
        secrets,
    )
