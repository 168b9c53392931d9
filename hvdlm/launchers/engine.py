"""A look at the installed Horovod that imports none of it: importing the frameworks it was built for takes seconds."""

from __future__ import annotations

import importlib.util
import json
import mmap
from dataclasses import dataclass
from pathlib import Path

from hvdlm.errors import EngineError

__all__ = ["Engine", "find_engine"]


@dataclass(frozen=True)
class Engine:
    """What the installed Horovod can do."""

    package: Path
    """Directory of the ``horovod`` package."""
    mpi: bool
    """Whether it was built with MPI."""
    family: str | None = None
    """``openmpi`` or ``mpich`` (and what shares its binary interface); None if it was built with neither."""
    mpirun: str | None = None
    """The ``mpirun`` of the MPI it was built with, where the build recorded it."""


def find_engine(package: Path | None = None) -> Engine:
    """Find Horovod and see whether it was built with MPI.

    Args:
        package: Directory of the ``horovod`` package; where the import system finds it if None.

    Raises:
        EngineError: Horovod is not installed, or has no native library.
    """
    if package is None:
        spec = importlib.util.find_spec("horovod")
        if spec is None or not spec.origin:
            raise EngineError("Horovod is not installed in this Python.", hint="hvdlm build-horovod")
        package = Path(spec.origin).parent
    libraries = [path for name in ("torch", "tensorflow") for path in sorted((package / name).glob("mpi_lib*.so"))]
    if not libraries:
        raise EngineError(
            f"Horovod in {package} was built for neither PyTorch nor TensorFlow.", hint="hvdlm build-horovod --force"
        )
    recorded = _recorded(package / "hvdlm_build.json")
    mpirun = recorded.get("mpirun")
    # One extension without MPI is enough to break a job over MPI that uses it, so all must have it.
    families = {_family(library) for library in libraries}
    family = families.pop() if len(families) == 1 else None
    return Engine(package, family is not None, family, mpirun if isinstance(mpirun, str) else None)


def _recorded(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _family(library: Path) -> str | None:
    # The names of the libraries it is linked with stand in the file as text.
    with open(library, "rb") as file:
        if file.seek(0, 2) == 0:
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if any(content.find(name) >= 0 for name in (b"\0libmpich.so", b"\0libmpi.so.12\0")):
                return "mpich"
            return "openmpi" if any(content.find(name) >= 0 for name in (b"\0libmpi.so", b"\0libmpi_cxx.so")) else None
