"""Starts Horovod for a framework, or says which build of it is missing."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from hvdlm.adapters.elastic_engine import Guarded, start_guarded
from hvdlm.errors import EngineError
from hvdlm.world import World

__all__ = ["give_communicator", "start_horovod", "stop_horovod"]

_RECORDED_AS = {"torch": "pytorch"}
"""Frameworks that Horovod's record of its build calls by another name."""

_communicator: Any = None


def give_communicator(comm: Any) -> None:
    """Have Horovod start in a communicator of mpi4py, or among a list of ranks: this process's from now on."""
    global _communicator
    _communicator = comm


def start_horovod(framework: str, version: str, lost: Callable[[], bool] | None = None) -> tuple[Any, World]:
    """Initialise ``horovod.<framework>``; returns the module and where this process stands.

    Args:
        framework: ``torch`` or ``tensorflow``.
        version: The version of the framework that is installed, for the message.
        lost: In an elastic job, tells whether a peer was lost meanwhile. What is returned then raises
            :class:`hvdlm.errors.PeerLost` where Horovod would say that it was shut down.

    Raises:
        EngineError: Horovod is missing or was built for another version.
        PeerLost: A peer was lost before all had found each other.
    """
    hvd = _import_horovod(framework, version)
    if lost is None:
        hvd.init(comm=_communicator)
    else:
        start_guarded(hvd, lost)
        hvd = Guarded(hvd)
    return hvd, World(
        rank=hvd.rank(),
        size=hvd.size(),
        local_rank=hvd.local_rank(),
        local_size=hvd.local_size(),
        cross_rank=hvd.cross_rank(),
        cross_size=hvd.cross_size(),
    )


def stop_horovod(framework: str) -> None:
    """Shut ``horovod.<framework>`` down, so that it can be started again; also after its peers have failed."""
    importlib.import_module(f"horovod.{framework}").shutdown()


def _import_horovod(framework: str, version: str) -> Any:
    try:
        return importlib.import_module(f"horovod.{framework}")
    except ImportError as error:
        try:
            installed = metadata.version("horovod")
        except metadata.PackageNotFoundError:
            raise EngineError(
                "Horovod is not installed, and this script was launched on several workers.",
                hint=f"hvdlm build-horovod --frameworks {framework}",
            ) from error
        raise EngineError(
            f"Horovod {installed} cannot be used with {framework} {version}; it was built for {framework} "
            f"{_built_for(framework)}: {error}",
            hint=f"hvdlm build-horovod --frameworks {framework} --force",
        ) from error


def _built_for(framework: str) -> str:
    for file in metadata.files("horovod") or ():
        if file.name == "metadata.json":
            record = json.loads(Path(str(file.locate())).read_text())
            return str(record.get(_RECORDED_AS.get(framework, framework), "nothing"))
    return "nothing"
