"""Where the rows of a file are: first row and place of each block, and seek points. Made once, then kept in a cache."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hvdlm.sources.compressed import CODECS, Cursor, detect, start_point, xz_points
from hvdlm.sources.files import DataFile
from hvdlm.sources.parquet import layout
from hvdlm.sources.rows import row_format

__all__ = ["FORMATS", "FileIndex", "format_of", "load_or_build", "write_atomically"]

_log = logging.getLogger("hvdlm")
_VERSION = 1
"""Of what is stored; a number that differs makes all indexes anew."""
_CHUNK = 1 << 20
_SHARD = re.compile(r"-\d+-of-\d+$")
"""How TensorFlow numbers the files of a set: data.tfrecord-00000-of-00004."""

FORMATS = {
    "jsonl": (".jsonl", ".ndjson", ".jsonlines"),
    "parquet": (".parquet", ".pq"),
    "text": (".txt", ".text", ".md", ".csv", ".tsv"),
    "tfrecord": (".tfrecord", ".tfrecords", ".tfrec"),
}
"""File name suffixes of each format."""


@dataclass(frozen=True)
class FileIndex:
    """Blocks of one file."""

    codec: str
    """``gzip``, ``zstd``, ``xz``, or empty for a file that is not compressed."""
    schema: str
    """Columns and their types, for Parquet."""
    rows: npt.NDArray[np.int64]
    """First row of each block and, behind them, the number of rows; shape (blocks + 1,)."""
    places: npt.NDArray[np.int64]
    """First byte of each block in the decompressed data and, behind them, its size, shape (blocks + 1,); for Parquet
    the row group of each block, shape (blocks,)."""
    points: npt.NDArray[np.int64]
    """See :data:`hvdlm.sources.compressed.Points`."""

    @property
    def num_rows(self) -> int:
        """Rows of the file."""
        return int(self.rows[-1])

    @property
    def num_blocks(self) -> int:
        """Blocks of the file."""
        return len(self.rows) - 1

    def segments(self) -> npt.NDArray[np.int64]:
        """Blocks at which reading can start; those between can only be read after the ones before them."""
        if not self.num_blocks:
            return np.zeros(0, dtype=np.int64)
        if self.schema:
            keys = self.places
        elif self.codec:
            keys = np.searchsorted(self.points[:, 1], self.places[:-1], side="right")
        else:
            return np.arange(self.num_blocks, dtype=np.int64)
        return np.flatnonzero(np.diff(keys, prepend=-1))


def format_of(name: str) -> str | None:
    """The format that a file name tells; None if it tells none."""
    stem = _SHARD.sub("", os.path.basename(name).lower())
    base, suffix = os.path.splitext(stem)
    if suffix in CODECS:
        suffix = os.path.splitext(_SHARD.sub("", base))[1]
    return next((kind for kind, suffixes in FORMATS.items() if suffix in suffixes), None)


def load_or_build(file: DataFile, kind: str, block_bytes: int, cache_dir: Path) -> FileIndex:
    """The index of a file, from the cache or made now.

    Any number of processes may do this at once: an entry appears whole.

    Raises:
        DataError: The file cannot be read, is truncated or damaged.
    """
    key = json.dumps(
        [_VERSION, file.name if file.store is not None else file.path, file.size, file.version, kind, block_bytes]
    )
    name = re.sub(r"[^\w.-]", "_", os.path.basename(file.path))[-60:]
    path = cache_dir / "index" / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["key"]) == key:
                return FileIndex(
                    str(stored["codec"]), str(stored["schema"]), stored["rows"], stored["places"], stored["points"]
                )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    index = _build(file, kind, block_bytes)
    stream = io.BytesIO()
    np.savez(stream, key=key, **{name: getattr(index, name) for name in FileIndex.__dataclass_fields__})
    try:
        write_atomically(path, [stream.getvalue()])
    except OSError as error:
        _log.warning("the index of %s cannot be kept in %s: %s", file.name, cache_dir, error)
    return index


def write_atomically(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file that is there whole or not at all, whoever else is writing it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name[:40]}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            for piece in pieces:
                stream.write(piece)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _build(file: DataFile, kind: str, block_bytes: int) -> FileIndex:
    start = file.read(0, 8)
    codec = detect(start) or ""
    named = CODECS.get(os.path.splitext(file.path.lower())[1], "")
    if start and named and codec != named:
        raise file.error(f"is named like {named} but is not compressed by it", hint=f"look at it: file {file.name}")
    if kind == "parquet":
        if codec:
            raise file.error("is compressed as a whole, which Parquet is not", hint="decompress it: " + file.name)
        rows, groups, schema = layout(file, block_bytes)
        return FileIndex("", schema, _array(rows), _array(groups), start_point())
    points = start_point()
    cutter = _Cutter(block_bytes)
    try:
        if codec == "xz":
            points = xz_points(file)
        cursor = Cursor(file, codec, start_point()) if codec else None
        for ends, counts in row_format(kind).ends(cursor.chunks() if cursor else _plain(file), file):
            cutter.add(ends, counts)
        cutter.finish()
    except EOFError as error:
        raise file.error(str(error), cutter.seen, hint="write or copy the file again") from error
    if cursor is not None and codec != "xz":
        points = _thinned(cursor.members, block_bytes)
    return FileIndex(codec, "", _array(cutter.rows), _array(cutter.places), points)


class _Cutter:
    """Cuts rows into blocks that reach a size."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self.rows, self.places = [0], [0]
        self.seen = self._end = 0

    def add(self, ends: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> None:
        """Take further ends of rows, and the rows up to each."""
        while (at := int(np.searchsorted(ends, self.places[-1] + self._block_bytes))) < len(ends):
            self.rows.append(int(counts[at]))
            self.places.append(int(ends[at]))
        self._end, self.seen = int(ends[-1]), int(counts[-1])

    def finish(self) -> None:
        """End the last block."""
        if self._end > self.places[-1]:
            self.rows.append(self.seen)
            self.places.append(self._end)


def _plain(file: DataFile) -> Iterator[bytes]:
    for start in range(0, file.size, _CHUNK):
        yield file.read(start, start + _CHUNK)


def _thinned(members: list[tuple[int, int]], spacing: int) -> npt.NDArray[np.int64]:
    """Seek points at the starts of members, not closer than ``spacing`` decompressed bytes."""
    kept = [(0, 0, -1, -1)]
    for stored, place in members:
        if place >= kept[-1][1] + spacing:
            kept.append((stored, place, -1, -1))
    return np.array(kept, dtype=np.int64)


def _array(values: list[int]) -> npt.NDArray[np.int64]:
    return np.array(values, dtype=np.int64)
