"""What `hvdlm doctor -H` says about several hosts: pure functions of what their agents found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["HostCheck", "Pair", "check_hosts", "slow_pairs"]

_MAX_CLOCK_SECONDS = 1.0
_MIN_MEMORY_BYTES = 2 * 2**30
_MIN_SHM_BYTES = 64 * 2**20
_SLOW = 0.5
"""A pair below this part of the median bandwidth is named."""

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class HostCheck:
    """One thing that was compared or looked at on every host."""

    name: str
    found: Mapping[str, str]
    """Host -> what was found there."""
    odd: tuple[str, ...]
    """Hosts that are not right, or differ from most."""
    hint: str = ""
    needed: bool = True
    """Whether a job cannot run while it is not right."""

    @property
    def ok(self) -> bool:
        """Whether every host is right."""
        return not self.odd


@dataclass(frozen=True)
class Pair:
    """The network from one host to another."""

    source: str
    target: str
    bytes_per_second: float
    latency_seconds: float
    error: str = ""


def check_hosts(
    facts: Mapping[str, Facts | str],
    names: Mapping[str, Mapping[str, str | None]],
    networks: Mapping[str, str],
) -> list[HostCheck]:
    """Compare hosts.

    Args:
        facts: Host -> what :func:`hvdlm.probe.facts_of_the_host` found there (``clock_seconds`` added: by how much its
            clock is ahead of ours), or why it cannot be reached.
        names: Host -> host name -> the address it resolves to there, None if it does not.
        networks: Host -> its address in the chosen network; hosts that have none are missing.
    """
    lost = {host: text for host, text in facts.items() if isinstance(text, str)}
    up: dict[str, Facts] = {host: found for host, found in facts.items() if not isinstance(found, str)}
    checks = [
        HostCheck(
            "reachable",
            {host: lost.get(host, "yes") for host in facts},
            tuple(lost),
            "; ".join(f"ssh -o BatchMode=yes {host} true" for host in lost),
        )
    ]
    if not up:
        return checks
    same = "install the same everywhere (a shared directory, or an image)"
    checks.append(_alike("python", {host: str(found["python"]) for host, found in up.items()}, same))
    checks.append(_alike("hvdlm", {host: str(found["hvdlm"]) for host, found in up.items()}, same))
    packages = sorted({name for found in up.values() for name in found["packages"]} - {"hvdlm"})
    for name in packages:
        versions = {host: str(found["packages"].get(name, "missing")) for host, found in up.items()}
        checks.append(_alike(name, versions, same))
    builds = {host: str(found["build"] or "none") for host, found in up.items()}
    checks.append(_alike("horovod build", builds, "hvdlm build-horovod on the odd host, with the same frameworks"))
    clocks = {host: float(found["clock_seconds"]) for host, found in up.items()}
    middle = sorted(clocks.values())[len(clocks) // 2]
    checks.append(
        HostCheck(
            "clock",
            {host: f"{clock - middle:+.1f} s" for host, clock in clocks.items()},
            tuple(host for host, clock in clocks.items() if abs(clock - middle) > _MAX_CLOCK_SECONDS),
            "set its clock: timedatectl set-ntp true",
            needed=False,
        )
    )
    checks.append(
        HostCheck(
            "network",
            {host: networks.get(host, "none of its interfaces is in it") for host in up},
            tuple(host for host in up if host not in networks),
            "--network-interfaces NAME names another",
        )
    )
    wrong = {
        host: [name for name, address in found.items() if name in networks and address != networks[name]]
        for host, found in names.items()
    }
    checks.append(
        HostCheck(
            "names",
            {host: ", ".join(f"{name} is {names[host][name]}" for name in bad) or "ok" for host, bad in wrong.items()},
            tuple(host for host, bad in wrong.items() if bad),
            "give each host its address in the chosen network in /etc/hosts of every host",
            needed=False,
        )
    )
    memory = {host: int(found["memory_bytes"]) for host, found in up.items()}
    checks.append(_enough("free memory", memory, _MIN_MEMORY_BYTES, "a worker needs about 1 GB before its model"))
    shm = {host: int(found["shm_bytes"]) for host, found in up.items()}
    checks.append(_enough("/dev/shm", shm, _MIN_SHM_BYTES, "a container needs --shm-size=1g"))
    cores = {host: str(found["cores"]) for host, found in up.items()}
    hint = "uneven hosts: --balance static or dynamic"
    return [*checks, _alike("cores", cores, hint, needed=False)]


def slow_pairs(pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs that failed, or are much slower than the others."""
    speeds = sorted(pair.bytes_per_second for pair in pairs if not pair.error)
    median = speeds[len(speeds) // 2] if speeds else 0.0
    return [pair for pair in pairs if pair.error or pair.bytes_per_second < _SLOW * median]


def _alike(name: str, found: Mapping[str, str], hint: str, needed: bool = True) -> HostCheck:
    """Most hosts are taken to be right; of two that differ, the first (from which the job is started)."""
    usual = Counter(found.values()).most_common(1)[0][0]
    return HostCheck(name, found, tuple(host for host, value in found.items() if value != usual), hint, needed)


def _enough(name: str, found: Mapping[str, int], least: int, hint: str) -> HostCheck:
    shown = {host: f"{count / 2**30:.1f} GB" for host, count in found.items()}
    return HostCheck(name, shown, tuple(host for host, count in found.items() if count < least), hint, needed=False)
