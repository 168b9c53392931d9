"""Compressed files, read as they are.

Where the format lets reading start in the middle there are seek points: at each gzip member and zstd frame (``bgzip``,
``pzstd``, files that were appended to or concatenated), and at each block of xz (``xz -T``, ``xz --block-size``).
A file that was compressed in one piece has one seek point, its start. It is decompressed from there on by a cursor that
stays where it is until the next piece is asked for; to go back, it is read again from the start. Nothing is written to
disk.
"""

from __future__ import annotations

import copy
import lzma
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdlm.sources.files import DataFile, need

__all__ = ["CODECS", "Cursor", "detect", "start_point", "xz_points"]

Points = npt.NDArray[np.int64]
"""Seek points, shape (n, 4): stored offset, place in the decompressed data, where the header to decode first is (-1:
none is needed), and the stored offset up to which it can be decoded (-1: as far as one likes)."""

CODECS = {".gz": "gzip", ".bgz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".xz": "xz"}
"""Compression by file name suffix."""
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz"}
_STORED_CHUNK = 1 << 18
"""Stored bytes read at once."""
_PLAIN_CHUNK = 1 << 18
"""Decompressed bytes made at once, so that a small file that holds a huge run of zeros cannot fill the memory."""
_XZ_HEADER = 12


def detect(data: bytes) -> str | None:
    """The compression of a file, by its first bytes; None if there is none."""
    return next((codec for magic, codec in _MAGIC.items() if data.startswith(magic)), None)


def start_point() -> Points:
    """The one seek point that each file has."""
    return np.array([[0, 0, -1, -1]], dtype=np.int64)


def _decoder(codec: str) -> Any:
    if codec == "gzip":
        return zlib.decompressobj(wbits=31)
    if codec == "xz":
        return lzma.LZMADecompressor(lzma.FORMAT_XZ)
    # The limit is that of `zstd --long=31`; memory is used as the file needs it.
    return need("zstandard", "reading zstd").ZstdDecompressor(max_window_size=2**31).decompressobj()


def _errors(codec: str) -> tuple[type[Exception], ...]:
    return (need("zstandard", "reading zstd").ZstdError,) if codec == "zstd" else (zlib.error, lzma.LZMAError)


class Cursor:
    """A place in a compressed file from which it is read on.

    Args:
        file: The file.
        codec: ``gzip``, ``zstd`` or ``xz``.
        points: Its seek points.
        number: The seek point to start at.
    """

    def __init__(self, file: DataFile, codec: str, points: Points, number: int = 0) -> None:
        self._file, self._codec, self._points = file, codec, points
        self._errors = _errors(codec)
        self.members: list[tuple[int, int]] = []
        """Stored offset and place of each member met on the way, the first left out."""
        self._ahead = b""
        self._start(number)

    def _start(self, number: int) -> None:
        self._number = number
        stored, place, header, end = (int(value) for value in self._points[number])
        self.place = place
        self._stored, self._stop = stored, self._file.size if end < 0 else end
        self._buffer = b""
        self._decoder = _decoder(self._codec)
        if header >= 0:
            self._decoder.decompress(self._file.read(header, header + _XZ_HEADER))

    def fork(self) -> Cursor | None:
        """Another cursor at the same place; None if the compression cannot do that."""
        if self._codec != "gzip":
            return None
        other = copy.copy(self)
        other._decoder = self._decoder.copy()
        other.members = []
        return other

    def chunks(self) -> Iterator[bytes]:
        """The rest of the file.

        Raises:
            EOFError: The file is truncated or damaged.
        """
        while chunk := self._more():
            yield chunk

    def read(self, start: int, end: int) -> bytes:
        """Bytes [start, end) of the decompressed data; ``start`` must not lie before ``place``.

        Raises:
            EOFError: The file is truncated or damaged.
        """
        pieces: list[bytes] = []
        ahead_of = self.place - len(self._ahead)
        assert start >= ahead_of, "a cursor reads forward only"
        while ahead_of < end:
            chunk, self._ahead = self._ahead or self._more(), b""
            if not chunk:
                raise EOFError("it is shorter than when it was indexed")
            until = ahead_of + len(chunk)
            if until > start:
                pieces.append(chunk[max(start - ahead_of, 0) : end - ahead_of])
            if until > end:
                self._ahead = chunk[end - ahead_of :]
            ahead_of = min(until, end)
        return b"".join(pieces)

    @property
    def next_place(self) -> int:
        """The first place that has not been read."""
        return self.place - len(self._ahead)

    def _more(self) -> bytes:
        """The next piece of decompressed data; empty at the end of the file."""
        while True:
            if self._decoder.eof:
                self._buffer = self._decoder.unused_data + self._buffer
                if not self._next_member():
                    return b""
            if not self._buffer and getattr(self._decoder, "needs_input", True):
                self._buffer = self._file.read(self._stored, min(self._stored + _STORED_CHUNK, self._stop))
                self._stored += len(self._buffer)
                if not self._buffer and self._at_end():
                    return b""
                if not self._buffer:
                    continue
            try:
                data = self._decode()
            except self._errors as error:
                raise EOFError(f"its {self._codec} data is damaged ({error})") from error
            if data:
                self.place += len(data)
                return data

    def _decode(self) -> bytes:
        buffer, self._buffer = self._buffer, b""
        if self._codec == "zstd":
            # It has no limit of its own: little input gives little output.
            buffer, self._buffer = buffer[: _STORED_CHUNK // 16], buffer[_STORED_CHUNK // 16 :]
            return bytes(self._decoder.decompress(buffer))
        data = self._decoder.decompress(buffer, _PLAIN_CHUNK)
        if self._codec == "gzip" and not self._decoder.eof:
            self._buffer = self._decoder.unconsumed_tail
        return bytes(data)

    def _next_member(self) -> bool:
        """Begin the member behind the one that has ended; False if there is none."""
        if self._codec != "zstd":
            self._buffer = self._buffer.lstrip(b"\0")  # padding, which both formats allow
        while not self._buffer:
            self._buffer = self._file.read(self._stored, min(self._stored + _STORED_CHUNK, self._stop))
            self._stored += len(self._buffer)
            if not self._buffer:
                return False
            if self._codec != "zstd":
                self._buffer = self._buffer.lstrip(b"\0")
        self.members.append((self._stored - len(self._buffer), self.place))
        self._decoder = _decoder(self._codec)
        return True

    def _at_end(self) -> bool:
        """Whether all is read, if there is no more input; else it goes on at the next seek point."""
        if self._points[self._number, 3] >= 0:
            if self._number + 1 == len(self._points):
                return True
            if self.place != self._points[self._number + 1, 1]:
                raise EOFError("its xz index is damaged")
            self._start(self._number + 1)
            return False
        if self._stored == 0:
            return True  # an empty file
        raise EOFError(f"its {self._codec} data ends in the middle: the file is truncated")


def xz_points(file: DataFile) -> Points:
    """The blocks of an xz file, from the indexes at the ends of its streams.

    The layout is that of "The .xz file format", version 1.2.1, sections 2 to 4.

    Raises:
        EOFError: The file is truncated or damaged.
    """
    streams: list[list[tuple[int, int]]] = []
    starts: list[int] = []
    end = file.size
    while end > 0:
        footer = file.read(max(end - _XZ_HEADER, 0), end)
        if footer[-4:] == b"\0\0\0\0":
            end -= 4
            continue
        if len(footer) < _XZ_HEADER or footer[-2:] != b"YZ":
            raise EOFError("its xz data ends in the middle: the file is truncated")
        length = (struct.unpack("<I", footer[4:8])[0] + 1) * 4
        blocks = _xz_index(file.read(end - _XZ_HEADER - length, end - _XZ_HEADER))
        start = end - 2 * _XZ_HEADER - length - sum((stored + 3) // 4 * 4 for stored, _ in blocks)
        if start < 0:
            raise EOFError("its xz index is damaged")
        streams.append(blocks)
        starts.append(start)
        end = start
    points = []
    place = 0
    for start, blocks in zip(reversed(starts), reversed(streams), strict=True):
        stored = start + _XZ_HEADER
        for number, (length, plain) in enumerate(blocks):
            padded = (length + 3) // 4 * 4
            points.append((stored, place, start, stored + padded) if number else (start, place, -1, -1))
            stored, place = stored + padded, place + plain
    return np.array(points, dtype=np.int64).reshape(-1, 4) if points else start_point()


def _xz_index(data: bytes) -> list[tuple[int, int]]:
    """Stored and plain size of each block."""
    numbers: list[int] = []
    value = shift = 0
    for byte in data[1:]:
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            numbers.append(value)
            value = shift = 0
    count = numbers[0] if numbers else 0
    if data[:1] != b"\0" or len(numbers) < 1 + 2 * count:
        raise EOFError("its xz index is damaged")
    return list(zip(numbers[1 : 1 + 2 * count : 2], numbers[2 : 2 + 2 * count : 2], strict=True))
