"""Keeps the ports of MPI on the network that was chosen, on every host of a job.

``mpirun``, its daemons and the MPI library listen on every interface, whatever they are told: ``btl_tcp_if_include``
and ``oob_tcp_if_include`` choose only which addresses are told to the others. A small library that is preloaded into
them (``bind_chosen.c``) changes the address they bind.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from hvdlm.environment import BIND_NETWORK, cache_dir

__all__ = ["LIBRARY", "compile_library", "preloading", "ssh_wrapper"]

_log = logging.getLogger("hvdlm")

LIBRARY = "bind.so"
_SOURCE = Path(__file__).with_name("bind_chosen.c")


def compile_library(environ: Mapping[str, str]) -> Path | None:
    """The library, compiled once and kept; None, with a warning, where that is not possible.

    Args:
        environ: Where ``PATH``, ``CC`` and the cache directory are looked up.
    """
    digest = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]
    kept = cache_dir(environ) / f"bind-{os.uname().machine}-{digest}.so"
    try:
        if not kept.exists():
            names = [environ["CC"]] if environ.get("CC") else ["cc", "gcc", "clang"]
            compiler = next(filter(None, (shutil.which(name, path=environ.get("PATH")) for name in names)), None)
            if compiler is None:
                raise OSError(f"{' or '.join(names)} is not on PATH")
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=kept.parent) as directory:
                made = Path(directory) / LIBRARY
                subprocess.run(
                    [compiler, "-shared", "-fPIC", "-O2", "-o", str(made), str(_SOURCE), "-ldl"],
                    check=True, capture_output=True, text=True, timeout=60,
                )  # fmt: skip
                made.replace(kept)
        return kept
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        _log.warning("MPI will listen on every interface of the hosts: the library against it is not there (%s)", said)
        return None


def preloading(library: Path | None, network: str, before: str | None = None) -> dict[str, str]:
    """The variables that preload the library; none if there is none.

    Args:
        library: The library.
        network: The network to listen in, as in ``10.0.0.0/24``.
        before: ``LD_PRELOAD`` as it is.
    """
    if library is None:
        return {}
    return {"LD_PRELOAD": ":".join(filter(None, (str(library), before))), BIND_NETWORK: network}


def ssh_wrapper(ssh: Sequence[str], directory: str, network: str | None) -> str:
    """A script that mpirun starts in place of ssh: with our options, and the library preloaded on the other side.

    Args:
        ssh: The ssh command, up to the host.
        directory: Where the library is on the other host; ``%h`` in it stands for the host's name.
        network: See :func:`preloading`; None to preload nothing.
    """
    setting = ""
    if network is not None:
        # The names are ours (mkdtemp's letters, an IPv4 network): the remote shell has nothing to misread.
        path = directory.replace("%h", "$(hostname)")
        setting = f"export LD_PRELOAD={path}/{LIBRARY} {BIND_NETWORK}={network}; "
    return (
        "#!/bin/sh\n"
        "# mpirun calls this with options of ssh's (which ours replace), a host and the words of a command.\n"
        'while [ "${1#-}" != "$1" ]; do shift; done\n'
        "host=$1; shift\n"
        f'exec {shlex.join(ssh)} -- "$host" {shlex.quote(setting)}"$*"\n'
    )
