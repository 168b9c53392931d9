"""What a worker's supervisor, the launcher and the agents on other hosts say to each other. Standard library only.

A message is a one-byte kind, a four-byte length and that many bytes. Control messages hold JSON; output travels as it
is. Nothing is ever unpickled. It travels over local sockets in directories only we can enter, and over ssh.
"""

from __future__ import annotations

import json
import re
import socket
import struct
from collections.abc import Iterator
from typing import Any

__all__ = [
    "AGENT_GREETING",
    "ANSWER",
    "CHANNEL",
    "ENDED",
    "ENVIRONMENT",
    "FAILED",
    "HEADER_BYTES",
    "HELLO",
    "INTERRUPT",
    "KILL",
    "LEFT_CODE",
    "LISTEN",
    "MAX_MESSAGE_BYTES",
    "PROBE",
    "PULSE",
    "READY",
    "SECONDS_OF_SILENCE",
    "SECONDS_TO_INTERRUPT",
    "SECONDS_TO_TERMINATE",
    "START",
    "STARTED",
    "STDERR",
    "STDIN",
    "STDOUT",
    "TERMINATE",
    "TROUBLE",
    "Decoder",
    "decode_channel",
    "encode",
    "encode_channel",
    "encode_json",
    "is_secondary",
    "last_traceback",
    "payload_bytes",
    "socket_path",
]

HELLO, STARTED, STDOUT, STDERR, TROUBLE, ENDED = b"h", b"s", b"o", b"e", b"f", b"x"
"""Supervisor to launcher: who I am, the program runs, its output, it will end by failing, how it ended."""
STDIN, INTERRUPT, TERMINATE, KILL = b"n", b"i", b"t", b"k"
"""Launcher to supervisor: here is your standard input (rank 0); send the program SIGINT, SIGTERM, SIGKILL."""
ENVIRONMENT = b"v"
"""To a supervisor that mpirun started: the environment of its program, as JSON."""
READY, FAILED, ANSWER = b"R", b"F", b"A"
"""Agent to launcher: what this host has; a worker that did not start; what a probe found."""
LISTEN, START, PROBE = b"L", b"S", b"Q"
"""Launcher to agent: the environment for supervisors that mpirun starts; start a worker; look at something."""
CHANNEL, PULSE = b"C", b"P"
"""Both ways: bytes of the connection with one supervisor (empty: it closed); a sign of life."""
AGENT_GREETING = b"\0hvdlm-agent-1\n"
"""The first thing an agent says. What comes before it is a banner, or the output of a shell's start-up file."""

SECONDS_OF_SILENCE = 60.0
"""An agent that hears nothing for this long has lost the launcher, and ends its workers. (A launcher that is suspended
with Ctrl-Z is silent too.)"""
MAX_MESSAGE_BYTES = 64 * 2**20
"""A longer message is not one of ours."""

SECONDS_TO_TERMINATE = 1.5
"""From SIGTERM to SIGKILL. The whole job has 5 seconds to end after a failure."""
SECONDS_TO_INTERRUPT = 2.0
"""From SIGINT to SIGTERM: Python code inside a collective does not see SIGINT."""

_HEADER = struct.Struct("!cI")
_CHANNEL = struct.Struct("!I")
_CHAINED = (
    b"The above exception was the direct cause of the following exception:",
    b"During handling of the above exception, another exception occurred:",
)
_START = re.compile(rb"^(?:Traceback \(most recent call last\):|Fatal Python error: |Exception in thread .*:)", re.M)
_SECONDARY = re.compile(
    rb"HorovodInternalError|Horovod has been shut down|gloo/transport/\S+ .*(?:by peer|[Tt]imed out)"
)
_NOISE = re.compile(rb"\n+Extension modules: [^\n]*\n?\Z")
"""What Python's fault handler adds: every extension module that is loaded."""
LEFT_CODE = 79
"""Exit code of a worker of an elastic job that has left it as it was told to: with 0 the training is done."""
HEADER_BYTES = _HEADER.size
"""Length of a message without payload."""
_MAX_TRACEBACK_BYTES = 32768


def encode(kind: bytes, payload: bytes = b"") -> bytes:
    """One message."""
    return _HEADER.pack(kind, len(payload)) + payload


def encode_json(kind: bytes, value: dict[str, Any]) -> bytes:
    """One message that holds a JSON object."""
    return encode(kind, json.dumps(value).encode())


def encode_channel(channel: int, data: bytes) -> bytes:
    """One message with bytes of the connection ``channel``."""
    return encode(CHANNEL, _CHANNEL.pack(channel) + data)


def decode_channel(payload: bytes) -> tuple[int, bytes]:
    r"""The channel and the bytes of a message of kind :data:`CHANNEL`.

    >>> decode_channel(encode_channel(7, b"abc")[HEADER_BYTES:])
    (7, b'abc')
    """
    return _CHANNEL.unpack_from(payload)[0], payload[_CHANNEL.size :]


def payload_bytes(header: bytes) -> int:
    """Length of the payload that follows a header."""
    return int(_HEADER.unpack(header)[1])


class Decoder:
    """Cuts a byte stream back into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Yield (kind, payload) for each message that is complete with ``data``.

        Raises:
            ValueError: A length that no message of ours has.
        """
        self._buffer += data
        while len(self._buffer) >= _HEADER.size:
            kind, length = _HEADER.unpack_from(self._buffer)
            if length > MAX_MESSAGE_BYTES:
                raise ValueError(f"a message of {length} bytes")
            end = _HEADER.size + length
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[_HEADER.size : end])
            del self._buffer[:end]
            yield kind, payload


def socket_path(template: str) -> str:
    """The path of the local socket on this host: ``%h`` in it stands for the host's name."""
    return template.replace("%h", socket.gethostname().replace("/", "_"))


def last_traceback(stderr: bytes) -> str | None:
    r"""The last Python traceback in the end of a program's stderr, with the exceptions it was raised from.

    >>> last_traceback(b"noise\nTraceback (most recent call last):\n  File ...\nValueError: no\n")
    'Traceback (most recent call last):\n  File ...\nValueError: no'
    """
    starts = [match.start() for match in _START.finditer(stderr)]
    if not starts:
        return None
    first = starts.pop()
    # A traceback that was raised from another one follows it and a fixed sentence: show both.
    while starts and _joined(stderr[starts[-1] : first]):
        first = starts.pop()
    text = _NOISE.sub(b"", stderr[first:])
    if len(text) > _MAX_TRACEBACK_BYTES:
        half = _MAX_TRACEBACK_BYTES // 2
        text = text[:half] + b"\n  [...]\n" + text[-half:]
    return text.decode(errors="replace").rstrip()


def _joined(between: bytes) -> bool:
    end = between.rstrip()
    return end.endswith(_CHAINED) or end.startswith(b"Exception in thread ")


def is_secondary(text: str) -> bool:
    r"""Whether a traceback, or the end of stderr, only says that another worker left the job.

    >>> is_secondary("...\nhorovod.common.exceptions.HorovodInternalError: Horovod has been shut down.")
    True
    """
    return _SECONDARY.search(text.encode()) is not None
