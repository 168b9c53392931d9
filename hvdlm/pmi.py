"""What processes need to find each other when ``mpiexec`` of MPICH or ``srun --mpi=pmi2`` started them.

Both hand each process an open connection and speak version 1 of the Process Management Interface over it: lines of
``key=value``, a store that all processes of the job share, and a barrier (P. Balaji et al., "PMI: A Scalable Parallel
Process-Management Interface for Extreme-Scale Systems", 2010). No MPI library takes part. Standard library only.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import os
import socket

from hvdlm.errors import LaunchError

__all__ = ["Pmi"]

_VALUE_BYTES = 200
"""Of a value in one entry of the store; the least that any implementation takes is 256."""
_SECONDS_TO_ANSWER = 300.0


class Pmi:
    """One process's connection.

    Args:
        handle: The descriptor (``PMI_FD``).
        rank: This process's rank.
        size: How many there are.

    Raises:
        LaunchError: What is at the other end does not speak it.
    """

    def __init__(self, handle: int, rank: int, size: int) -> None:
        self._rank, self._size, self._rounds = rank, size, 0
        try:
            self._connection = socket.socket(fileno=os.dup(handle))
        except OSError as error:
            raise LaunchError(f"the launcher's connection (PMI_FD={handle}) is not there: {error.strerror}.") from None
        self._connection.settimeout(_SECONDS_TO_ANSWER)
        self._buffer = b""
        self._ask("init", "response_to_init", pmi_version="1", pmi_subversion="1")
        self._store = self._ask("get_my_kvsname", "my_kvsname")["kvsname"]
        # One that leaves without a word has failed, and the launcher ends the others.
        atexit.register(self._finish)

    def allgather(self, text: str) -> list[str]:
        """What each process says, by rank; all of them call it."""
        self._rounds += 1
        coded = base64.b64encode(text.encode()).decode()
        parts = [coded[i : i + _VALUE_BYTES] for i in range(0, len(coded), _VALUE_BYTES)] or [""]
        for number, part in enumerate(parts):
            more = "." if number == len(parts) - 1 else "~"
            self._ask("put", "put_result", kvsname=self._store, key=self._key(self._rank, number), value=part + more)
        self._ask("barrier_in", "barrier_out")
        return [self._get(rank) for rank in range(self._size)]

    def _get(self, rank: int) -> str:
        coded, number = "", 0
        while not coded.endswith("."):
            entry = self._ask("get", "get_result", kvsname=self._store, key=self._key(rank, number))["value"]
            coded, number = coded.rstrip("~") + entry, number + 1
        return base64.b64decode(coded[:-1]).decode()

    def _key(self, rank: int, number: int) -> str:
        return f"hvdlm-{self._rounds}-{rank}-{number}"

    def _ask(self, command: str, answer: str, **values: str) -> dict[str, str]:
        words = " ".join([f"cmd={command}", *(f"{name}={value}" for name, value in values.items())])
        try:
            self._connection.sendall(f"{words}\n".encode())
            while b"\n" not in self._buffer:
                data = self._connection.recv(4096)
                if not data:
                    raise LaunchError(f"the launcher hung up when it was told {command!r} (PMI).")
                self._buffer += data
        except OSError as error:
            raise LaunchError(f"the launcher does not answer {command!r} (PMI): {error}.") from None
        line, _, self._buffer = self._buffer.partition(b"\n")
        found = dict(word.split("=", 1) for word in line.decode(errors="replace").split() if "=" in word)
        if found.get("cmd") != answer or found.get("rc", "0") != "0":
            raise LaunchError(f"the launcher answered {command!r} (PMI) with {line.decode(errors='replace')!r}.")
        return found

    def _finish(self) -> None:
        with contextlib.suppress(OSError, LaunchError):
            self._connection.settimeout(2.0)
            self._ask("finalize", "finalize_ack")
        self._connection.close()
