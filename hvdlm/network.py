"""The network interfaces of this machine. Standard library only: it is asked for on hosts that have nothing else."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Sequence

__all__ = ["chosen_address", "interface_towards", "interfaces"]

_SIOCGIFADDR, _SIOCGIFNETMASK, _SIOCGIFFLAGS = 0x8915, 0x891B, 0x8913
_IFF_UP = 1


def interfaces() -> dict[str, str]:
    """Name -> ``address/prefix length`` (IPv4) of every interface that is up, loopback too."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:

        def ask(request: int, name: str) -> bytes:
            # struct ifreq: 16 bytes of name, then a union of 24.
            return fcntl.ioctl(probe.fileno(), request, struct.pack("40s", name.encode()[:15]))

        for _, name in socket.if_nameindex():
            try:
                (flags,) = struct.unpack_from("H", ask(_SIOCGIFFLAGS, name), 16)
                address = socket.inet_ntoa(ask(_SIOCGIFADDR, name)[20:24])
                mask = socket.inet_ntoa(ask(_SIOCGIFNETMASK, name)[20:24])
            except OSError:  # it has no IPv4 address
                continue
            if flags & _IFF_UP:
                found[name] = f"{address}/{ipaddress.IPv4Network(f'0.0.0.0/{mask}').prefixlen}"
    return found


def chosen_address(names: Sequence[str], network: str = "") -> str | None:
    """The address of the first of these interfaces; of one in ``network``; else the one this host's name stands for.

    None where there is none, or the name stands for loopback, as on Debian.
    """
    here = interfaces()
    if names:
        return here[names[0]].partition("/")[0] if names[0] in here else None
    if network:
        wanted = ipaddress.ip_network(network)
        return next((str(ip.ip) for ip in map(ipaddress.ip_interface, here.values()) if ip.ip in wanted), None)
    try:
        named = socket.gethostbyname(socket.gethostname())
    except OSError:
        return None
    return named if any(named == found.partition("/")[0] for found in here.values()) and named[:4] != "127." else None


def interface_towards(address: str) -> str | None:
    """Name of the interface through which packets to an address leave; None if there is none. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError:
            return None
        own = probe.getsockname()[0]
    return next((name for name, found in interfaces().items() if found.partition("/")[0] == own), None)
