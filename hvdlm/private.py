"""Files and directories that only the person can read. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any

__all__ = ["make_private", "open_private"]


def make_private(directory: Path) -> None:
    """Make a directory that only the person can enter; one that is there stays as it is."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    directory.mkdir(mode=0o700, exist_ok=True)


def open_private(path: str | os.PathLike[str], mode: str = "w") -> IO[Any]:
    """Open a file to write that only the person can read, if it is made now."""
    encoding = None if "b" in mode else "utf-8"
    return open(path, mode, encoding=encoding, opener=lambda name, flags: os.open(name, flags, 0o600))
