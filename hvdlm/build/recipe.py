"""A build as a value: what goes into it, its cache key, its environment and the record it leaves in the wheel."""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvdlm.build.edits import Mend, digest
from hvdlm.build.mends import HOROVOD, LABEL, select_mends
from hvdlm.build.sdist import SHA256
from hvdlm.build.toolchain import Mpi

__all__ = ["FRAMEWORKS", "RECORD", "Recipe", "horovod_variables"]

FRAMEWORKS = ("torch", "tensorflow")
RECORD = "hvdlm_build.json"
"""Name of the record in the ``horovod`` package."""
_SWITCHES = {"torch": "PYTORCH", "tensorflow": "TENSORFLOW", "mxnet": "MXNET"}
_FLAGS = ("CXX", "CXXFLAGS", "CPPFLAGS", "LDFLAGS")
# Where a GPU build finds its toolkits. The rest of HOROVOD_* in a person's environment is about running, or would build
# something other than what the key says.
_GPU_VARIABLES = ("HOME", "INCLUDE", "LIB", "LINK", "CC_LIST")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a built wheel depends on."""

    frameworks: Mapping[str, str]
    """Framework -> its version."""
    mpi: Mpi | None
    gpu: str | None
    compiler: str
    arch_flags: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    """Variables of the person's environment that steer the build."""
    python: str = field(
        default_factory=lambda: f"{sys.version_info.major}.{sys.version_info.minor} {sysconfig.get_config_var('SOABI')}"
    )
    """Version and binary interface."""
    machine: str = field(default_factory=sysconfig.get_platform)

    @property
    def mends(self) -> tuple[Mend, ...]:
        """The mends this build applies."""
        conditions = set() if self.gpu else {"cpu"}
        if {"-mavx", "-mf16c"} <= set(self.arch_flags):
            conditions.add("avx")
        return select_mends(conditions)

    @property
    def version(self) -> str:
        """Version of the wheel."""
        return f"{HOROVOD}+{LABEL}"

    @property
    def rpath(self) -> tuple[str, ...]:
        """Where the built libraries look for others, seen from ``site-packages/horovod/<framework>``."""
        own = {"torch": "$ORIGIN/../../torch/lib", "tensorflow": "$ORIGIN/../../tensorflow"}
        paths = [own[name] for name in self.frameworks]
        if self.mpi is not None:
            # The wheel puts its libraries into lib/ of the environment, four levels up, wherever that environment is.
            paths += ["$ORIGIN/../../../.."] if self.mpi.kind == "wheel" else self.mpi.lib_dirs
        return tuple(paths)

    def record(self) -> dict[str, Any]:
        """What the wheel says about itself."""
        mpi = self.mpi
        return {
            "horovod": HOROVOD,
            "version": self.version,
            "key": self.key(),
            "sdist_sha256": SHA256,
            "mends": [mend.name for mend in self.mends],
            "mends_sha256": digest(self.mends),
            "frameworks": dict(self.frameworks),
            "mpi": mpi and {"kind": mpi.kind, "vendor": mpi.vendor, "version": mpi.version},
            # The wheel's mpirun stands beside the Python it is used from, so its path is not a fact about the build.
            "mpirun": mpi.mpirun if mpi is not None and mpi.kind == "system" else None,
            "gpu": self.gpu,
            "python": self.python,
            "machine": self.machine,
            "compiler": self.compiler,
            "arch_flags": list(self.arch_flags),
            "variables": dict(self.variables),
        }

    def key(self) -> str:
        """Cache key: equal exactly if a wheel built from the one recipe serves the other."""
        parts = {
            "sdist": SHA256,
            "label": LABEL,
            "mends": digest(self.mends),
            "frameworks": dict(self.frameworks),
            "mpi": self.mpi and self.mpi.identity,
            "gpu": self.gpu,
            "python": self.python,
            "machine": self.machine,
            "compiler": self.compiler,
            "arch_flags": self.arch_flags,
            "variables": dict(self.variables),
            "build": _BUILD_FLAGS,
            "rpath": self.rpath,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]

    def environment(self, environ: Mapping[str, str], jobs: int) -> dict[str, str]:
        """The environment to run Horovod's ``setup.py`` in.

        Args:
            environ: The person's environment.
            jobs: Compilers to run at the same time.
        """
        result = {name: value for name, value in environ.items() if not name.startswith("HOROVOD_")}
        result |= self.variables
        result |= _BUILD_FLAGS
        result["LDFLAGS"] = f"{environ.get('LDFLAGS', '')} -Wl,-s".strip()  # no symbols that nothing can refer to
        path = [str(Path(sys.executable).parent), *environ.get("PATH", "").split(":")]
        if self.mpi is not None:
            path.insert(0, str(Path(self.mpi.mpicxx).parent))
        result["PATH"] = ":".join(filter(None, path))
        # Makes setup.py leave -j to us: its -j8 needs more memory than small machines have.
        result["MAKEFLAGS"] = f"-j{jobs}"
        result["CMAKE_BUILD_PARALLEL_LEVEL"] = str(jobs)
        result["HOROVOD_LOCAL_VERSION"] = LABEL
        result["HOROVOD_RPATH"] = ";".join(self.rpath)
        if self.arch_flags:
            result["HOROVOD_BUILD_ARCH_FLAGS"] = " ".join(self.arch_flags)
        result["HOROVOD_WITH_GLOO"] = "1"
        result["HOROVOD_WITH_MPI" if self.mpi is not None else "HOROVOD_WITHOUT_MPI"] = "1"
        for name, switch in _SWITCHES.items():
            result[f"HOROVOD_{'WITH' if name in self.frameworks else 'WITHOUT'}_{switch}"] = "1"
        if self.gpu == "nccl":
            result["HOROVOD_GPU_OPERATIONS"] = "NCCL"
        else:
            result["HOROVOD_WITHOUT_NVTX"] = "1"
        return result


_BUILD_FLAGS = {"CMAKE_GENERATOR": "Ninja"}


def horovod_variables(environ: Mapping[str, str], gpu: str | None) -> dict[str, str]:
    """The variables of an environment that steer a build."""
    result = {name: environ[name] for name in _FLAGS if environ.get(name)}
    if gpu is not None:
        for name, value in environ.items():
            if name.startswith("HOROVOD_") and name.endswith(_GPU_VARIABLES):
                result[name] = value
    return result
