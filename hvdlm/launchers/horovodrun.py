"""Jobs handed to horovodrun as they are: elastic ones and jsrun (LSF)."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from hvdlm.errors import ConfigError
from hvdlm.launchers.base import JobSpec
from hvdlm.launchers.flags import flags_to_arguments

__all__ = ["LAUNCHER", "HorovodrunLauncher", "execute", "render"]


def render(spec: JobSpec) -> list[str]:
    """The command line of horovodrun for a job; it adds to it what it adds."""
    flags = dict(spec.flags)
    flags.pop("hostfile", None)
    if spec.hosts:
        flags["hosts"] = ",".join(map(str, spec.hosts))
    if spec.num_proc:  # LSF knows it by itself
        flags["num_proc"] = spec.num_proc
    program = list(spec.command)
    # horovodrun's own parser reads a first word with a dash as a flag of its own.
    if program[0].startswith("-"):
        program[0] = os.path.join(os.curdir, program[0])
    return [sys.executable, "-m", "horovod.runner.launch", *flags_to_arguments(flags), *program]


def execute(argv: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Become that command."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(argv[0], list(argv), dict(environment))


class HorovodrunLauncher:
    """Becomes horovodrun."""

    def submit(self, spec: JobSpec) -> int:
        """Replace this process by horovodrun; see :class:`hvdlm.launchers.base.Launcher`.

        Raises:
            ConfigError: A limit that horovodrun knows nothing of.
        """
        for dest, flag in (("max_memory", "--max-memory"), ("nice", "--nice")):
            if dest in spec.flags:
                raise ConfigError(f"{flag} is not for jobs that horovodrun starts.", hint=f"leave out {flag}")
        execute(render(spec), spec.environment)


LAUNCHER = HorovodrunLauncher()
