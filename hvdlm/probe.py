"""What an agent can look at on its host, for ``hvdlm doctor -H``. Standard library only."""

from __future__ import annotations

import hashlib
import importlib.machinery
import json
import os
import secrets
import shutil
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

__all__ = ["answer", "facts_of_the_host"]

_PACKAGES = ("torch", "tensorflow", "tensorflow_cpu", "keras", "numpy", "horovod", "hvdlm")
_SECONDS_TO_WAIT = 15.0
_PING_BYTES, _PINGS = 1, 20
_CHUNK_BYTES = 1 << 18

_waiting: dict[str, _Listener] = {}


def answer(request: dict[str, Any]) -> Any:
    """What was found.

    Args:
        request: ``probe`` names what to look at (``facts``, ``resolve``, ``listen``, ``measure``); the rest are its
            arguments.
    """
    probe = request["probe"]
    if probe == "facts":
        return facts_of_the_host(request["packages"])
    if probe == "resolve":
        return {name: _resolve(name) for name in request["names"]}
    if probe == "listen":
        listener = _Listener(request["address"])
        _waiting[listener.secret] = listener
        return {"port": listener.port, "secret": listener.secret}
    if probe == "measure":
        return _measure(request["address"], request["port"], request["secret"], float(request["seconds"]))
    return None


def facts_of_the_host(packages: str) -> dict[str, Any]:
    """Versions, clock, memory, cores and places of this host.

    Args:
        packages: Directory of the installed packages, as the launcher has it.
    """
    versions = {}
    for found in Path(packages).glob("*.dist-info") if os.path.isdir(packages) else ():
        name, _, version = found.name[: -len(".dist-info")].rpartition("-")
        if name.lower() in _PACKAGES:
            versions[name.lower()] = version
    record = Path(packages, "horovod", "hvdlm_build.json")
    try:
        content = record.read_bytes()
        build = hashlib.sha256(json.dumps(json.loads(content), sort_keys=True).encode()).hexdigest()[:12]
    except (OSError, ValueError):
        build = None
    memory = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return {
        "host": socket.gethostname(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "packages": versions,
        "build": build,
        "hvdlm": _digest(Path(__file__).parent),
        "time": time.time(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": int(memory["MemAvailable"].split()[0]) * 1024,
        "shm_bytes": shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0,
        "directory": os.path.isdir(os.getcwd()),
        "suffix": importlib.machinery.EXTENSION_SUFFIXES[0],
    }


def _digest(directory: Path) -> str:
    """Of the source: other versions of hvdlm on other hosts would not understand each other."""
    found = hashlib.sha256()
    for path in sorted(directory.rglob("*.py")):
        found.update(path.relative_to(directory).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:12]


def _resolve(name: str) -> str | None:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return None


class _Listener:
    """Takes one measurement from a peer that knows the secret, at one address, for a short time."""

    def __init__(self, address: str) -> None:
        self.secret = secrets.token_hex(16)
        self._server = socket.create_server((address, 0))
        self._server.settimeout(_SECONDS_TO_WAIT)
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with self._server:
            try:
                while True:
                    connection, _ = self._server.accept()
                    with connection:
                        connection.settimeout(5)
                        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                        if connection.recv(len(self.secret), socket.MSG_WAITALL) == self.secret.encode():
                            self._take(connection)
                            return
            except OSError:
                return

    @staticmethod
    def _take(connection: socket.socket) -> None:
        for _ in range(_PINGS):
            connection.sendall(connection.recv(_PING_BYTES, socket.MSG_WAITALL))
        total = 0
        while data := connection.recv(_CHUNK_BYTES):
            total += len(data)
        connection.sendall(total.to_bytes(8, "big"))


def _measure(address: str, port: int, secret: str, seconds: float) -> dict[str, Any]:
    """Latency (half of the median round trip) and bandwidth to a listener."""
    try:
        with socket.create_connection((address, port), timeout=5) as connection:
            connection.settimeout(10)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(secret.encode())
            trips = []
            for _ in range(_PINGS):
                start = time.perf_counter()
                connection.sendall(b"x")
                connection.recv(_PING_BYTES, socket.MSG_WAITALL)
                trips.append(time.perf_counter() - start)
            start, chunk = time.perf_counter(), bytes(_CHUNK_BYTES)
            while time.perf_counter() - start < seconds:
                connection.sendall(chunk)
            connection.shutdown(socket.SHUT_WR)
            arrived = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "big")
            took = time.perf_counter() - start
    except OSError as error:
        return {"error": error.strerror or str(error)}
    return {"latency_seconds": sorted(trips)[_PINGS // 2] / 2, "bytes_per_second": arrived / took}
