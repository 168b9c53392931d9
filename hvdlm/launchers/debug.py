"""One worker, in this very process: breakpoints, ``pdb`` and profilers work as in a plain run."""

from __future__ import annotations

import os
import runpy
import sys

from hvdlm.errors import ConfigError
from hvdlm.launchers.base import JobSpec

__all__ = ["LAUNCHER", "DebugLauncher"]


class DebugLauncher:
    """Runs the script in the launcher's process."""

    def submit(self, spec: JobSpec) -> int:
        """Run the script to its end; what it raises passes through.

        Raises:
            ConfigError: More than one worker, or a program that is not Python.
        """
        if spec.num_proc != 1:
            raise ConfigError(
                f"the debug launcher runs one worker, not {spec.num_proc}.", hint="-np 1 --launcher debug"
            )
        if "max_memory" in spec.flags:
            raise ConfigError("nothing watches the memory of the debug launcher.", hint="leave out --max-memory")
        interpreter, *rest = spec.command
        if interpreter != sys.executable or not rest:
            raise ConfigError(
                f"the debug launcher runs a Python script or module, not {interpreter!r}.",
                hint="hvdlm run --launcher debug script.py",
            )
        os.environ.update(spec.environment)
        os.nice(spec.flags.get("nice", 0))
        if rest[0] == "-m":
            sys.argv = rest[1:]
            sys.path.insert(0, os.getcwd())
            runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = rest
            sys.path.insert(0, os.path.dirname(os.path.abspath(rest[0])))
            runpy.run_path(rest[0], run_name="__main__")
        return 0


LAUNCHER = DebugLauncher()
