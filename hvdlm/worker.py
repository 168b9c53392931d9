"""The supervisor of one worker: runs the person's program, passes on what it prints, and says how it ended.

The launcher starts one per worker, directly or through ``mpirun``. It imports the standard library only, so that it
costs a few milliseconds, and it never outlives the launcher: when their socket closes, the program is ended. On another
host the socket is that of the launcher's agent. Without a socket, output goes to stdout and stderr with a prefix, and
the exit code tells the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping

from hvdlm import wire
from hvdlm.environment import read_environment
from hvdlm.memory import MemoryWatch
from hvdlm.processes import die_with_parent, step_aside
from hvdlm.supervisor import Supervisor

__all__ = ["main"]

_MPI = re.compile(r"OMPI_|OPAL_|PMIX_|PMI_|PRTE_|MPI_|MPIR_|HYDI?_|MV2_|I_MPI_|SLURM_")


def main(argv: list[str] | None = None) -> None:
    """Run ``[--socket PATH] [--logs DIR] ... -- PROGRAM [ARGUMENT ...]`` and exit with its code."""
    parser = argparse.ArgumentParser(prog="python -m hvdlm.worker", description="Supervise one worker of a job.")
    parser.add_argument("--socket", help="the socket of the launcher or its agent; %%h in it is this host's name")
    parser.add_argument("--worker", type=int, help="what the launcher calls this worker (default: its rank)")
    parser.add_argument("--receive-environment", action="store_true", help="the environment comes from the socket")
    parser.add_argument("--alone-if-unreachable", action="store_true", help="run without launcher if it is elsewhere")
    parser.add_argument("--logs", help="directory for this rank's logs")
    parser.add_argument("--max-memory", type=int, metavar="MIB", help="end the program if it uses more")
    parser.add_argument("--nice", type=int, default=0, help="lower the program's priority")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    if args.worker is None:
        step_aside()  # an mpirun that ends kills what it has started: nobody would end the program's own children
    else:
        die_with_parent(signal.SIGTERM)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    environment = read_environment()
    launcher = None if args.socket is None else _connect(wire.socket_path(args.socket), args.alone_if_unreachable)
    logs = args.logs if args.logs and os.path.isdir(args.logs) else None
    stdin = None if environment.rank == 0 else subprocess.DEVNULL
    variables = None
    if launcher is not None:
        if args.receive_environment:
            variables = _joined(os.environ, _receive_environment(launcher))
        worker = environment.rank if args.worker is None else args.worker
        hello = {"worker": worker, "rank": environment.rank, "size": environment.size, "pid": os.getpid()}
        launcher.sendall(wire.encode_json(wire.HELLO, hello))
        stdin = subprocess.DEVNULL
        if worker == 0:
            # From hand to hand, not through mpirun: Open MPI 5.0 never tells rank 0 that its input has ended.
            _, given, _, _ = socket.recv_fds(launcher, wire.HEADER_BYTES, 1)
            if given:
                stdin = given[0]
                os.set_inheritable(stdin, False)
    supervisor = Supervisor(command, environment.rank, environment.size, logs, launcher, stdin, variables)
    supervisor.memory, supervisor.nice = MemoryWatch(args.max_memory), args.nice
    supervisor.shows_noise = (environment if variables is None else read_environment(variables)).tensorflow_logs
    code = supervisor.run()
    # With a launcher listening, mpirun must not act on an exit code too: it would end the others before the launcher
    # knows which failure came first.
    sys.exit(0 if supervisor.launcher is not None else code)


def _connect(path: str, optional: bool) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except OSError as error:
        connection.close()
        if optional:
            return None
        sys.exit(f"hvdlm.worker: no launcher or agent on {socket.gethostname()} at {path}: {error.strerror}")
    return connection


def _receive_environment(launcher: socket.socket) -> dict[str, str]:
    # Not a byte of what follows: it comes with a descriptor.
    header = launcher.recv(wire.HEADER_BYTES, socket.MSG_WAITALL)
    payload = launcher.recv(wire.payload_bytes(header), socket.MSG_WAITALL) if header else b""
    if not payload:
        sys.exit("hvdlm.worker: the launcher is gone")
    return dict(json.loads(payload))


def _joined(here: Mapping[str, str], received: Mapping[str, str]) -> dict[str, str]:
    """This host's environment with what was received; what MPI has set stays, the program finds its place by it."""
    joined = {**here, **received, **{name: value for name, value in here.items() if _MPI.match(name)}}
    for name in ("LD_LIBRARY_PATH", "LD_PRELOAD"):
        parts = dict.fromkeys(filter(None, ":".join((here.get(name, ""), received.get(name, ""))).split(":")))
        if parts:
            joined[name] = ":".join(parts)
    return joined


if __name__ == "__main__":
    main()
