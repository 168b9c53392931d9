"""What somebody on the network may send to a job's ports."""

from __future__ import annotations

import base64
import os
import pickle
import subprocess
import sys
from pathlib import Path

from hvdlm import wire
from tests.lab.hosts import OTHER_SUBNET, Host, Lab, inside

__all__ = ["attack", "send"]


class Evil:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch '{self.path}'",)


SEND = """
import socket, sys
messages = [bytes.fromhex(text) for text in sys.stdin.read().split()]
for message in messages:
    try:
        with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=3) as connection:
            connection.sendall(message)
            connection.settimeout(0.3)
            connection.recv(1000)
    except OSError as error:
        print(type(error).__name__)
"""


def send(source: Host, address: str, port: int, messages: list[bytes]) -> list[str]:
    """Send each message on a connection of its own; returns the errors."""
    done = subprocess.run(
        [*inside(source.namespace, source.name), sys.executable, "-c", SEND, address, str(port)],
        input="\n".join(message.hex() for message in messages),
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return done.stdout.split()


def forged(created: Path) -> list[bytes]:
    """What somebody on the network might try."""
    evil = pickle.dumps(Evil(created))
    body = base64.b64encode(evil)
    put = b"PUT /%s HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s"
    frame = wire.encode_json(wire.HELLO, {"worker": 1, "rank": 1, "size": 4, "pid": 1})
    return [
        evil,
        len(evil).to_bytes(4, "big") + evil,
        put % (b"worker_addresses/h1:0", len(body), body),
        put % (b"global/0", len(evil), evil),
        put % (b"wrong-secret:1/global/0", 3, b"abc"),
        b"GET /global/0 HTTP/1.1\r\n\r\n",
        b"PUT /x/y HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
        frame,
        wire.encode_json(wire.START, {"worker": 9, "command": ["touch", str(created)], "environment": {}}),
        b"\0" * 4096,
        os.urandom(4096),
    ]


def attack(hosts: Lab, created: Path) -> int:
    """Send everything to each port that listens on the first two hosts; returns how many do.

    Raises:
        AssertionError: One listens elsewhere than on the chosen interface, or cannot be reached there.
    """
    found = 0
    for host, other in (hosts.hosts[:2], hosts.hosts[1::-1]):
        for address, port in hosts.listening(host):
            found += 1
            assert address in (host.address, "127.0.0.1", "::1"), "only on the chosen interface, or loopback"
            if address == "::1":
                continue
            source = host if address == "127.0.0.1" else other
            assert "ConnectionRefusedError" not in send(source, address, port, forged(created))
            elsewhere = f"{OTHER_SUBNET}.{host.address.rpartition('.')[2]}"
            assert send(other, elsewhere, port, [b"x"]) == ["ConnectionRefusedError"]
    return found
