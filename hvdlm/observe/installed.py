"""The installed Horovod as it lies on the disk: what it was built with, without importing it."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvdlm.build.recipe import RECORD
from hvdlm.errors import EngineError
from hvdlm.launchers.engine import find_engine

__all__ = ["Installed", "find_installed"]

_LIBRARIES = {"torch": "mpi_lib_v2", "tensorflow": "mpi_lib"}
# Horovod's own name for torch in its metadata.json.
_NAMES = {"pytorch": "torch", "tensorflow": "tensorflow"}


@dataclass(frozen=True, kw_only=True)
class Installed:
    """What is known of the installed Horovod."""

    version: str
    package: Path
    record: Mapping[str, Any] = field(default_factory=dict)
    """What hvdlm wrote into the wheel; empty if another built it."""
    built_with: Mapping[str, str] = field(default_factory=dict)
    """Framework -> the version it was compiled against."""
    libraries: tuple[str, ...] = ()
    """Frameworks with a native library that this Python can load."""
    mpi: bool = False


def find_installed(path: list[str] | None = None) -> Installed | None:
    """The installed Horovod; None if there is none.

    Args:
        path: Directories to look in; those Python imports from if None.
    """
    found = importlib.metadata.distributions(name="horovod", path=sys.path if path is None else path)
    distribution = next(iter(found), None)
    if distribution is None:
        return None
    package = Path(str(distribution.locate_file("horovod")))
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    libraries = tuple(name for name, stem in _LIBRARIES.items() if (package / name / f"{stem}{suffix}").is_file())
    metadata = _read(package / "metadata.json")
    try:
        mpi = find_engine(package).mpi
    except EngineError:
        mpi = False
    return Installed(
        version=distribution.version,
        package=package,
        record=_read(package / RECORD),
        built_with={ours: str(metadata[theirs]) for theirs, ours in _NAMES.items() if theirs in metadata},
        libraries=libraries,
        mpi=mpi,
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
