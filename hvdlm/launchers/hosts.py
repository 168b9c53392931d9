"""Host strings, host files, and which rank goes where."""

from __future__ import annotations

import re
import socket
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hvdlm.errors import ConfigError

__all__ = [
    "Host",
    "Slot",
    "assign",
    "is_local",
    "parse_hostfile",
    "parse_hosts",
    "parse_names",
    "weights_of",
]

# A name that starts with a dash would be taken for an option by ssh and mpirun.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_FILE_LINE = re.compile(
    r"(\S+)(?:\s+slots\s*=\s*(\d+))?(?:\s+max_slots\s*=\s*\d+)?(?:\s+weight\s*=\s*(\d+\.?\d*|\.\d+))?"
)


@dataclass(frozen=True)
class Host:
    """A host and how many workers it takes."""

    name: str
    slots: int
    weight: float | None = None
    """Relative speed of each of its workers; None if the host file gives none."""

    def __str__(self) -> str:
        return f"{self.name}:{self.slots}"


@dataclass(frozen=True, kw_only=True)
class Slot:
    """The place of one worker. Field names are those Horovod's rendezvous server reads."""

    hostname: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int


def parse_hosts(text: str) -> tuple[Host, ...]:
    """Hosts of a ``-H`` value.

    >>> parse_hosts("a:2,b:1")
    (Host(name='a', slots=2, weight=None), Host(name='b', slots=1, weight=None))

    Raises:
        ConfigError: Not of the form ``host:slots,host:slots``.
    """
    pairs = (part.strip().rpartition(":") for part in text.split(","))
    return _checked(((name, slots) for name, _, slots in pairs), f"-H {text!r}")


def parse_names(text: str) -> tuple[str, ...]:
    """Names of hosts, slots left out if they are given.

    >>> parse_names("a,b:4")
    ('a', 'b')

    Raises:
        ConfigError: One is no host name, or none is given.
    """
    parts = [part.strip() for part in text.split(",")]
    return tuple(host.name for host in parse_hosts(",".join(p if ":" in p else f"{p}:1" for p in parts)))


def parse_hostfile(path: str) -> tuple[Host, ...]:
    """Hosts of a file with lines ``name slots=N weight=W``; empty lines and ``#`` comments are skipped.

    Slots default to 1. A weight is the relative speed of each worker there, used by ``balance="static"``.

    Raises:
        ConfigError: The file cannot be read, or a line has another form.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read host file {path!r}: {getattr(error, 'strerror', error)}.") from None
    found = []
    weights: dict[str, float] = {}
    for number, line in enumerate(lines, start=1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        match = _FILE_LINE.fullmatch(content)
        if match is None:
            raise ConfigError(
                f"{path}:{number}: {line!r} is no host; a line is of the form: name slots=N weight=W.",
                hint="for example: worker-0 slots=2, or worker-0 slots=2 weight=0.5",
            )
        found.append((match[1], match[2] or "1"))
        if match[3]:
            weights[match[1]] = float(match[3])
    if not found:
        raise ConfigError(f"host file {path!r} names no host.", hint="a line is of the form: worker-0 slots=2")
    if weights and not any(weights.get(name, 1.0) for name, _ in found):
        raise ConfigError(f"host file {path!r}: all weights are 0.", hint="give a host a weight above 0")
    hosts = _checked(found, f"host file {path!r}")
    return tuple(replace(host, weight=weights.get(host.name)) for host in hosts)


def weights_of(hosts: Sequence[Host], slots: Sequence[Slot]) -> tuple[float, ...]:
    """The weight of each rank, 1 where its host has none; empty if no host has one.

    >>> hosts = (Host("a", 2, 2.0), Host("b", 1))
    >>> weights_of(hosts, assign(hosts, 3)), weights_of(hosts[1:], assign(hosts[1:], 1))
    ((2.0, 2.0, 1.0), ())
    """
    known = {host.name: host.weight for host in hosts if host.weight is not None}
    return tuple(known.get(slot.hostname, 1.0) for slot in slots) if known else ()


def _checked(pairs: Iterable[tuple[str, str]], where: str) -> tuple[Host, ...]:
    hosts: list[Host] = []
    for name, slots in pairs:
        if not _NAME.fullmatch(name) or not slots.isdecimal() or int(slots) < 1:
            shown = f"{name}:{slots}" if name else slots
            raise ConfigError(
                f"{where}: {shown!r} is no host; the form is host:slots with at least one slot, joined by commas.",
                hint="for example: -H localhost:2 or -H worker-0:4,worker-1:4",
            )
        if any(host.name == name for host in hosts):
            raise ConfigError(f"{where}: host {name!r} is named twice.", hint=f"add its slots up: {name}:N")
        hosts.append(Host(name, int(slots)))
    return tuple(hosts)


def assign(hosts: Sequence[Host], num_proc: int) -> tuple[Slot, ...]:
    """Give ranks 0 to ``num_proc`` - 1 to the hosts in order, filling each before the next.

    Raises:
        ConfigError: There are fewer slots than workers.
    """
    total = sum(host.slots for host in hosts)
    if num_proc > total:
        raise ConfigError(
            f"-np {num_proc}: the hosts have {total} slots ({','.join(map(str, hosts))}).",
            hint=f"-np {total}, or give hosts more slots",
        )
    places = [(host.name, local) for host in hosts for local in range(host.slots)][:num_proc]
    per_host: dict[str, int] = defaultdict(int)
    across: dict[int, list[str]] = defaultdict(list)
    for name, local in places:
        per_host[name] += 1
        across[local].append(name)
    return tuple(
        Slot(
            hostname=name,
            rank=rank,
            size=num_proc,
            local_rank=local,
            local_size=per_host[name],
            cross_rank=across[local].index(name),
            cross_size=len(across[local]),
        )
        for rank, (name, local) in enumerate(places)
    )


def is_local(name: str) -> bool:
    """Whether a host name stands for this machine."""
    if name in ("localhost", "127.0.0.1", socket.gethostname()):
        return True
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return False
    # Only an address of this machine can be bound; nothing is sent.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
