"""Rows in a stream of bytes: lines of text, lines of JSON, TFRecords."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hvdlm.sources.files import DataFile, need

__all__ = ["Ends", "RowFormat", "row_format"]

Places = npt.NDArray[np.int64]
Ends = tuple[Places, Places]
"""Places behind rows, ascending, and how many rows lie before each."""


class RowFormat(Protocol):
    """How rows are found in bytes."""

    def ends(self, chunks: Iterable[bytes], file: DataFile) -> Iterator[Ends]:
        """Where rows end, while the file streams by. Rows so far are given even if the next one is broken."""

    def split(self, data: bytes) -> Places:
        """Start and end of each row in whole rows of data; shape (rows, 2)."""

    def value(self, data: bytes, file: DataFile, row: int) -> Any:
        """What a row holds."""


def row_format(name: str) -> RowFormat:
    """``text``, ``jsonl`` or ``tfrecord``."""
    return _TFRecords() if name == "tfrecord" else _Lines(json_values=name == "jsonl")


class _Lines:
    """Lines, as str or as the JSON values in them. Empty lines are rows of text; between JSON values they are not."""

    def __init__(self, json_values: bool) -> None:
        self._json = json_values

    def ends(self, chunks: Iterable[bytes], file: DataFile) -> Iterator[Ends]:
        place = end = rows = 0
        last = b""
        for chunk in chunks:
            data = np.frombuffer(last + chunk, dtype=np.uint8)
            # The byte before this chunk is kept, to see a carriage return at the seam.
            newlines = np.flatnonzero(data[len(last) :] == 10) + len(last)
            found = newlines - len(last) + place + 1
            counts = rows + np.cumsum(self._filled(found, end, data, newlines))
            place += len(chunk)
            last = chunk[-1:]
            if len(found):
                end, rows = int(found[-1]), int(counts[-1])
                yield found, counts
        if place > end and not (self._json and place - end == 1 and last == b"\r"):
            yield np.array([place]), np.array([rows + 1])

    def _filled(
        self, ends: Places, before: int, data: npt.NDArray[np.uint8], newlines: Places
    ) -> npt.NDArray[np.bool_]:
        """Which of the lines that end here are rows."""
        filled = np.ones(len(ends), dtype=bool)
        if self._json and len(ends):
            lengths = np.diff(ends, prepend=before)
            filled = (lengths > 1) & ~((lengths == 2) & (data[np.maximum(newlines - 1, 0)] == 13))
        return filled

    def split(self, data: bytes) -> Places:
        ends = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == 10)
        if not data.endswith(b"\n"):
            ends = np.append(ends, len(data))
        starts = np.concatenate(([0], ends[:-1] + 1))
        # b"\r\n" ends a line too.
        bytes_ = np.frombuffer(data, dtype=np.uint8)
        ends = ends - ((ends > starts) & (bytes_[np.maximum(ends - 1, 0)] == 13))
        bounds = np.stack([starts, ends], axis=1)
        return bounds[ends > starts] if self._json else bounds

    def value(self, data: bytes, file: DataFile, row: int) -> Any:
        try:
            text = data.decode("utf-8-sig" if row == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise file.error(f"the row is not UTF-8: {error}", row, hint="convert the file: iconv -t utf-8") from None
        if not self._json:
            return text
        try:
            return json.loads(text)
        except ValueError as error:
            shown = text if len(text) <= 60 else text[:57] + "..."
            raise file.error(
                f"the row is no JSON ({error}): {shown!r}", row, hint="each line has to be one JSON value"
            ) from None


class _TFRecords:
    """Length, its checksum, the bytes, their checksum; checksums are CRC-32C, rotated and offset.

    The layout is described in TensorFlow's ``tensorflow/core/lib/io/record_writer.h``.
    """

    def __init__(self) -> None:
        self._crc: Callable[[bytes], int] = need("google_crc32c", "reading TFRecords").value

    def ends(self, chunks: Iterable[bytes], file: DataFile) -> Iterator[Ends]:
        buffer, base, rows = bytearray(), 0, 0
        for chunk in chunks:
            buffer += chunk
            found, start, broken = [], 0, None
            try:
                while len(buffer) - start >= 12:
                    stop = start + 16 + self._length(buffer, start)
                    if len(buffer) < stop:
                        break
                    self._check(bytes(memoryview(buffer)[start + 12 : stop]))
                    found.append(base + stop)
                    start = stop
            except EOFError as error:
                broken = error
            if found:
                yield np.array(found), rows + np.arange(1, len(found) + 1)
            rows += len(found)
            if broken is not None:
                raise broken
            del buffer[:start]
            base += start
        if buffer:
            raise EOFError(f"{len(buffer)} bytes are left where a record should be: the file is truncated")

    def split(self, data: bytes) -> Places:
        bounds, start = [], 0
        while start < len(data):
            stop = start + 16 + (self._length(data, start) if len(data) - start >= 16 else 0)
            if stop > len(data):
                raise EOFError("a record is cut short: the file is damaged")
            bounds.append((start + 12, stop))
            start = stop
        return np.array(bounds, dtype=np.int64).reshape(-1, 2)

    def value(self, data: bytes, file: DataFile, row: int) -> Any:
        try:
            self._check(data)
        except EOFError as error:
            raise file.error(str(error), row, hint="write or copy the file again") from None
        return data[:-4]

    def _length(self, data: bytes | bytearray, start: int) -> int:
        length, stored = struct.unpack_from("<QI", data, start)
        if self._mask(bytes(data[start : start + 8])) != stored:
            raise EOFError("the checksum of the record's length is wrong: the file is damaged or holds no TFRecords")
        return int(length)

    def _check(self, data: bytes) -> None:
        """Check a record that is followed by its checksum."""
        if self._mask(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
            raise EOFError("the checksum of the record is wrong: the file is damaged")

    def _mask(self, data: bytes) -> int:
        crc = self._crc(data)
        return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
