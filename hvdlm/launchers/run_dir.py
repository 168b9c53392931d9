"""The directory a run leaves."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from hvdlm.errors import ConfigError
from hvdlm.private import make_private

__all__ = ["make_run_dir"]


def make_run_dir(given: str | None, script: str) -> Path:
    """Make the run directory and its ``logs``, which only the person can read: scripts print what they like.

    A directory that was there keeps its mode, except for ``logs``; the files in it are the person's alone.

    Args:
        given: ``--run-dir``, None for ``hvdlm-runs/<time>-<script>``.
        script: What is run, for the name.

    Raises:
        ConfigError: It cannot be made or written.
    """
    if given is None:
        stem = re.sub(r"[^\w.-]+", "_", Path(script).stem).lstrip("-.") or "run"
        path = Path("hvdlm-runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{stem[:80]}"
        number, first = 1, path
        while path.exists():
            number += 1
            path = first.with_name(f"{first.name}-{number}")
    else:
        path = Path(given)
    path = Path(os.path.abspath(path))
    try:
        make_private(path)
        logs = path / "logs"
        make_private(logs)
        logs.chmod(0o700)
        probe = logs / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"run directory {str(path)!r} cannot be written: {error.strerror}.", hint="--run-dir DIR names another one"
        ) from None
    return path
