"""The line between a worker of an elastic job and its driver: JSON objects over TCP. Standard library only.

Both ends prove that they know the job's key before anything is said (HMAC-SHA256 over both sides' nonces, as in
RFC 2104), nothing is unpickled, and the key travels in the environment only. A line is not encrypted: what it carries
(ranks, step numbers, the address of a rendezvous) is no secret.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import secrets
import socket
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["Lines", "dial", "greet", "mac", "new_key"]

MAX_LINE_BYTES = 1 << 20
_SECONDS_TO_GREET = 10.0


def new_key() -> str:
    """A key for one job."""
    return secrets.token_hex(32)


def mac(key: str, *parts: str) -> str:
    """What proves knowledge of the key; the parts say who is speaking and to what."""
    return hmac.new(key.encode(), "|".join(parts).encode(errors="replace"), hashlib.sha256).hexdigest()


class Lines:
    """One end of an open line. Sending is safe from several threads."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = bytearray()
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """For selectors; -1 once closed."""
        return self._socket.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Send an object; an end that is gone is noticed by reading."""
        data = json.dumps(message).encode() + b"\n"
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(data)

    def receive(self) -> list[dict[str, Any]] | None:
        """Wait for data and return the objects it completes, none if it completes none; None if the line is closed.

        Raises:
            ValueError: The other end sends something else.
        """
        try:
            data = self._socket.recv(65536)
        except OSError:
            data = b""
        if not data:
            return None
        self._buffer += data
        return list(self._complete())

    def _complete(self) -> Iterator[dict[str, Any]]:
        while (end := self._buffer.find(b"\n")) >= 0:
            value = json.loads(self._buffer[:end])
            del self._buffer[: end + 1]
            if not isinstance(value, dict):
                raise ValueError("not a JSON object")
            yield value
        if len(self._buffer) > MAX_LINE_BYTES:
            raise ValueError("a line without end")

    def one(self) -> dict[str, Any]:
        """Wait for the next object, while nothing else reads.

        Raises:
            ConnectionError: The line closed first.
        """
        while True:
            found = self.receive()
            if found is None:
                raise ConnectionError("the line closed")
            if found:
                return found[0]

    def close(self) -> None:
        """Hang up."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def dial(address: str, port: int, worker: int, key: str) -> Lines:
    """Call the driver.

    Args:
        address: Where it listens.
        port: Its port.
        worker: Who is calling.
        key: The job's key.

    Raises:
        ConnectionError: Nobody is there, or it does not know the key.
    """
    connection = socket.create_connection((address, port), timeout=_SECONDS_TO_GREET)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    lines = Lines(connection)
    theirs = str(lines.one().get("nonce"))
    ours = secrets.token_hex(16)
    lines.send({"worker": worker, "nonce": ours, "mac": mac(key, "worker", str(worker), theirs, ours)})
    if not _same(lines.one().get("mac"), mac(key, "driver", ours, theirs)):
        raise ConnectionError("the other end does not know the job's key")
    connection.settimeout(None)
    return lines


def greet(connection: socket.socket, key: str) -> tuple[int, Lines]:
    """Find out who calls; returns the worker and the line.

    Raises:
        ConnectionError: It does not know the key, says something else, or nothing for 10 seconds.
    """
    connection.settimeout(_SECONDS_TO_GREET)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    lines = Lines(connection)
    ours = secrets.token_hex(16)
    lines.send({"nonce": ours})
    try:
        said = lines.one()
        worker, theirs = int(said["worker"]), str(said["nonce"])
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ConnectionError(f"no worker: {type(error).__name__}") from None
    if not _same(said.get("mac"), mac(key, "worker", str(worker), ours, theirs)):
        raise ConnectionError("the caller does not know the job's key")
    lines.send({"mac": mac(key, "driver", theirs, ours)})
    connection.settimeout(None)
    return worker, lines


def _same(given: object, wanted: str) -> bool:
    # As bytes: for texts that are not ASCII compare_digest raises.
    return hmac.compare_digest(str(given).encode(errors="replace"), wanted.encode())
