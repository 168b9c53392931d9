"""TensorBoard event files without TensorBoard: records of scalars, framed and checksummed as TFRecord does."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from hvdlm.private import make_private, open_private

__all__ = ["EventFile", "masked_crc32c"]


def _table() -> list[int]:
    table = []
    for n in range(256):
        for _ in range(8):
            n = (n >> 1) ^ (0x82F63B78 if n & 1 else 0)
        table.append(n)
    return table


_TABLE = _table()


def masked_crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), rotated and offset as in TFRecord files.

    >>> hex(masked_crc32c(b"123456789"))
    '0xc7839352'
    """
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


class EventFile:
    """Writes scalars that ``tensorboard --logdir`` shows.

    Args:
        directory: Where the file is made, with its directories.
    """

    def __init__(self, directory: Path) -> None:
        make_private(directory)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.hvdlm"
        self.path = directory / name
        self._write(struct.pack("<Bd", 0x09, time.time()) + _field(3, b"brain.Event:2"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write values by tag, all of one step."""
        summary = b"".join(
            _field(1, _field(1, tag.encode()) + struct.pack("<Bf", 0x15, value)) for tag, value in values.items()
        )
        self._write(struct.pack("<Bd", 0x09, time.time()) + b"\x10" + _varint(max(0, step)) + _field(5, summary))

    def _write(self, event: bytes) -> None:
        header = struct.pack("<Q", len(event))
        record = header + struct.pack("<I", masked_crc32c(header)) + event + struct.pack("<I", masked_crc32c(event))
        with open_private(self.path, "ab") as file:
            file.write(record)
