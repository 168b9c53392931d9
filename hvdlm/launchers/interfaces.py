"""Which network interface each host of a job uses. Pure functions."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hvdlm.errors import ConfigError

__all__ = ["Network", "choose_network", "own_network"]

Interfaces = Mapping[str, str]
"""Name -> ``address/prefix length``."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """What a job communicates over."""

    address: str
    """Address of this host, where its rendezvous server listens."""
    cidr: str
    """The network of that address, as in ``10.0.0.0/24``."""
    here: tuple[str, ...]
    """Interfaces of this host; Gloo uses the first."""
    others: Mapping[str, tuple[str, ...]]
    """Interfaces of each other host. Their names may differ from host to host."""


def choose_network(
    given: Sequence[str], here: Interfaces, others: Mapping[str, Interfaces], towards: str | None = None
) -> Network:
    """The interfaces of a job.

    >>> h2 = {"h2": {"lo": "127.0.0.1/8", "ens5": "10.0.0.2/24"}}
    >>> choose_network([], {"lo": "127.0.0.1/8", "eth0": "10.0.0.1/24"}, h2).others
    {'h2': ('ens5',)}

    Args:
        given: ``--network-interfaces``: names that must be there on each host; empty to choose.
        here: The interfaces of this host.
        others: Those of each other host of the job.
        towards: The interface of this host through which another host is reached; used if it fits.

    Raises:
        ConfigError: An interface that was given is not there, or no network joins the hosts.
    """
    if given:
        chosen = own_network(given, here)
        for host, there in others.items():
            _check(given, there, f"on {host}")
        return replace(chosen, others=dict.fromkeys(others, chosen.here))
    if not others:
        return own_network((), here)
    for name in sorted(here, key=lambda name: name != towards):
        network = ipaddress.ip_interface(here[name]).network
        if network.is_loopback:
            continue
        found = {host: _in_network(there, network) for host, there in others.items()}
        if name == towards:
            # Reached through a router, a host has another network: the interface it would be reached at is the one
            # that is not loopback, if there is only one.
            found = {host: known or _only(others[host]) for host, known in found.items()}
        if all(found.values()):
            joined = {host: (str(known),) for host, known in found.items()}
            return replace(own_network((name,), here), others=joined)
    lines = "; ".join(f"{host}: {_listed(there)}" for host, there in [("this host", here), *others.items()])
    raise ConfigError(
        f"no network was found that joins the hosts. Their interfaces are {lines}.",
        hint="--network-interfaces NAME names the one to use",
    )


def own_network(given: Sequence[str], here: Interfaces, *, outside: bool = False) -> Network:
    """The interfaces of this host alone.

    Args:
        given: ``--network-interfaces``; if none, the loopback interface.
        here: The interfaces there are.
        outside: If none is given, choose one that other hosts can reach.

    Raises:
        ConfigError: An interface that was given is not there, or there is none.
    """
    _check(given, here, "here")
    chosen = tuple(given) or tuple(sorted(here, key=lambda name: _is_loopback(here[name]) == outside)[:1])
    if not chosen:
        raise ConfigError("this machine has no network interface with an IPv4 address.", hint="ip link set lo up")
    first = ipaddress.ip_interface(here[chosen[0]])
    return Network(address=str(first.ip), cidr=str(first.network), here=chosen, others={})


def _check(given: Sequence[str], there: Interfaces, where: str) -> None:
    for name in given:
        if name not in there:
            raise ConfigError(
                f"--network-interfaces: {name!r} is no interface with an IPv4 address {where}; "
                f"there are: {_listed(there)}.",
                hint=f"--network-interfaces {_first(there)}" if there else None,
            )


def _in_network(there: Interfaces, network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> str | None:
    return next((name for name, found in there.items() if ipaddress.ip_interface(found).ip in network), None)


def _only(there: Interfaces) -> str | None:
    outward = [name for name, found in there.items() if not _is_loopback(found)]
    return outward[0] if len(outward) == 1 else None


def _is_loopback(found: str) -> bool:
    return ipaddress.ip_interface(found).ip.is_loopback


def _address(found: str) -> str:
    return found.partition("/")[0]


def _first(there: Interfaces) -> str:
    return sorted(there, key=lambda name: (_is_loopback(there[name]), name))[0]


def _listed(there: Interfaces) -> str:
    return ", ".join(f"{name} {_address(found)}" for name, found in sorted(there.items())) or "none"
