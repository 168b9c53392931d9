"""What ``hvdlm run`` checks before it starts an elastic job."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import Any

from hvdlm.errors import ConfigError
from hvdlm.launchers.discovery import make_source
from hvdlm.launchers.hosts import Host

__all__ = ["check_elastic", "is_elastic"]

_MARKS = ("min_num_proc", "max_num_proc", "host_discovery_script", "host_discovery")


def is_elastic(flags: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    """Whether flags or options ask for an elastic job."""
    return bool(options.get("elastic")) or any(dest in flags for dest in _MARKS)


def check_elastic(
    flags: Mapping[str, Any], options: Mapping[str, Any], hosts: tuple[Host, ...], environment: Mapping[str, str]
) -> int:
    """Check what was given for an elastic job; returns the most workers it is expected to have.

    Raises:
        ConfigError: Limits contradict each other, or it is not said where workers may run.
    """
    least, most, start = (flags.get(dest) for dest in ("min_num_proc", "max_num_proc", "num_proc"))
    if flags.get("use_mpi"):
        raise ConfigError("an elastic job cannot run over MPI.", hint="leave --mpi out")
    if options.get("elastic") is False:
        raise ConfigError("--no-elastic, with flags of an elastic job.", hint="leave one of them out")
    if least and most and least > most:
        raise ConfigError(f"--min-np {least} is more than --max-np {most}.", hint=f"--max-np {least}")
    if start and most and start > most:
        raise ConfigError(f"-np {start} is more than --max-np {most}.", hint=f"--max-np {start}")
    if start and least and start < least:
        raise ConfigError(f"-np {start} is less than --min-np {least}.", hint=f"-np {least}")
    _check_script(flags.get("host_discovery_script"))
    make_source(flags, hosts, environment)
    known = sum(host.slots for host in hosts)
    if known and least and known < least:
        raise ConfigError(
            f"--min-np {least}: the hosts have {known} slots ({','.join(map(str, hosts))}).",
            hint=f"--min-np {known}, or give hosts more slots",
        )
    return int(most or start or known or least or 1)


def _check_script(command: str | None) -> None:
    if command is None:
        return
    try:
        program = shlex.split(command)[0]
    except (ValueError, IndexError):
        raise ConfigError(f"--host-discovery-script {command!r} is no command.") from None
    if not os.access(program, os.X_OK) or os.path.isdir(program):
        raise ConfigError(f"--host-discovery-script {command!r} is no executable file.", hint=f"chmod u+x {program}")
