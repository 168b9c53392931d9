"""Files as a map-style data set: row number -> row."""

from __future__ import annotations

import hashlib
import logging
import operator
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from hvdlm.algorithms.blocks import BlockOrder
from hvdlm.environment import cache_dir as default_cache_dir
from hvdlm.errors import ConfigError, DataError
from hvdlm.sources.files import DataFile, find_files
from hvdlm.sources.index import FORMATS, FileIndex, format_of, load_or_build
from hvdlm.sources.reading import BlockReader

__all__ = ["FileDataset", "open_files"]

_log = logging.getLogger("hvdlm")

_INDEXERS = 4
"""Files that are indexed at the same time."""


def open_files(
    sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    format: str = "auto",
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    columns: Sequence[str] | None = None,
    block_bytes: int = 1 << 18,
    cache_bytes: int = 1 << 26,
) -> FileDataset:
    """A data set of the rows of some files, for a DataLoader, a PyDataset or anything that asks for row numbers.

    A row is a str (text: a line), whatever the line holds (jsonl), a dict by column (parquet) or bytes (tfrecord: the
    record as it was written). Files may be compressed (gzip, zstd, xz); see :mod:`hvdlm.sources.compressed`.

    The first call goes through all files once, to find where rows begin, and keeps that in the cache; later ones look
    at names, sizes and times only. Processes that start together may all call it; to let one do the work, call it
    inside ``with hvdlm.main_first():``.

    >>> dataset = open_files("data/*.jsonl.gz")  # doctest: +SKIP
    >>> len(dataset), dataset[0]["text"]  # doctest: +SKIP
    (1000000, 'Once upon a time')

    Args:
        sources: Paths, globs, directories or URLs (``s3://bucket/data/*.parquet``: all that fsspec knows).
        format: ``text``, ``jsonl``, ``parquet``, ``tfrecord``, or ``auto``: by file name.
        cache_dir: Where indexes are kept; hvdlm's cache if None.
        columns: The columns to read of Parquet files; all if None.
        block_bytes: What is read at once, in decompressed bytes.
        cache_bytes: Blocks that a process keeps in memory.

    Raises:
        ConfigError: ``format`` is none of these, or a size is not positive.
        DataError: No file is found, formats are mixed, or a file cannot be read, is truncated or damaged; says which
            file and row.
    """
    if format != "auto" and format not in FORMATS:
        raise ConfigError(f"format is {format!r}; allowed: auto, {', '.join(FORMATS)}.", hint="leave it out for auto")
    for name, size in (("block_bytes", block_bytes), ("cache_bytes", cache_bytes)):
        if size < 1:
            raise ConfigError(f"{name} is {size}; allowed: 1 or more.")
    files = find_files(sources)
    kind = _agreed_format(files) if format == "auto" else format
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir)
    begin = time.monotonic()
    with ThreadPoolExecutor(min(_INDEXERS, len(files))) as pool:
        indexes = list(pool.map(lambda file: load_or_build(file, kind, block_bytes, cache), files))
    _log.debug("indexes of %d files are ready after %.1f s", len(files), time.monotonic() - begin)
    return FileDataset(files, indexes, kind, columns=columns, cache_bytes=cache_bytes)


class FileDataset:
    """Rows of files by number, in the order of the files. Made by :func:`open_files`.

    A file is opened when a row of it is asked for. It can be pickled, forked and shared by threads.

    Args:
        files: The files.
        indexes: The index of each.
        kind: Their format.
        columns: The columns to read of Parquet files; all if None.
        cache_bytes: Blocks that a process keeps in memory.

    Raises:
        DataError: There are no rows, or Parquet files differ in their columns.
    """

    def __init__(
        self,
        files: Sequence[DataFile],
        indexes: Sequence[FileIndex],
        kind: str,
        *,
        columns: Sequence[str] | None = None,
        cache_bytes: int = 1 << 26,
    ) -> None:
        self.files, self.kind = files, kind
        self._indexes, self._cache_bytes = indexes, cache_bytes
        self._columns = None if columns is None else list(columns)
        for file, index in zip(files, indexes, strict=True):
            if index.schema != indexes[0].schema:
                raise file.error(
                    f"its columns are ({index.schema}), those of {files[0].name} are ({indexes[0].schema})",
                    hint="open files of different columns apart, or write them alike",
                )
        self._starts = np.cumsum([0, *(index.num_rows for index in indexes)], dtype=np.int64)
        if not self._starts[-1]:
            raise DataError(f"there are no rows in {_listed(files)}.", hint="check how the files were written")
        self._reader: BlockReader | None = None

    def __repr__(self) -> str:
        return f"FileDataset({self.kind}, files={len(self.files)}, rows={len(self)})"

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: SupportsIndex) -> Any:
        """One row.

        Raises:
            IndexError: There is no such row.
            DataError: The file cannot be read there, has changed, or the row does not hold what it should.
        """
        file, within = self._locate(row)
        return self._readers().row(file, within)

    def __getitems__(self, rows: Sequence[SupportsIndex]) -> list[Any]:
        """Several rows: reads them block by block and gives them in the order asked for. DataLoader calls this."""
        numbers = [operator.index(row) for row in rows]
        found = {number: self[number] for number in sorted(set(numbers))}
        return [found[number] for number in numbers]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}

    @property
    def fingerprint(self) -> str:
        """Stands for what is in the data set; the same wherever the files lie and whenever they were copied."""
        digest = hashlib.sha256(self.kind.encode())
        for file, index in zip(self.files, self._indexes, strict=True):
            digest.update(f"\n{os.path.basename(file.path)} {file.size} {index.num_rows}".encode())
        return digest.hexdigest()[:16]

    @property
    def first_rows(self) -> npt.NDArray[np.int64]:
        """First row of each block and, behind them, the number of rows; int64, shape (blocks + 1,)."""
        firsts = [index.rows[:-1] + start for index, start in zip(self._indexes, self._starts[:-1], strict=True)]
        return np.concatenate([*firsts, self._starts[-1:]])

    def block_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The block of each row: a key under which rows that are read together stay together."""
        return np.searchsorted(self.first_rows, rows, side="right") - 1

    def block_order(self, key: int, *, batch_size: int = 1, window: int = 8, lanes: int = 16) -> BlockOrder:
        """An order of all rows in which workers read few blocks at a time, each its own.

        The cache has to hold ``lanes * window`` blocks (32 MiB, as it is) on a worker that is alone, fewer on several.
        Files that can only be read from the start keep the order of their blocks.

        Args:
            key: Chooses the order. See :func:`hvdlm.algorithms.hashing.derive_seed`.
            batch_size: Samples per global batch.
            window: Blocks within which rows are permuted.
            lanes: Parts of the global batch that read blocks of their own; more than there are workers.
        """
        blocks = np.cumsum([0, *(index.num_blocks for index in self._indexes)])
        segments = np.concatenate([index.segments() + at for index, at in zip(self._indexes, blocks[:-1], strict=True)])
        return BlockOrder(self.first_rows, key, window=window, batch_size=batch_size, lanes=lanes, segments=segments)

    def where(self, row: SupportsIndex) -> str:
        """The file of a row and its number in it, for messages."""
        file, within = self._locate(row)
        return f"{self.files[file].name}, row {within}"

    def close(self) -> None:
        """Let go of blocks in memory; reading on takes them up again."""
        if self._reader is not None and self._reader.process == os.getpid():
            self._reader.close()
        self._reader = None

    def _locate(self, row: SupportsIndex) -> tuple[int, int]:
        number = operator.index(row)
        number += len(self) if number < 0 else 0
        if not 0 <= number < len(self):
            raise IndexError(f"row {operator.index(row)} of a data set of {len(self)} rows")
        file = int(np.searchsorted(self._starts, number, side="right")) - 1
        return file, number - int(self._starts[file])

    def _readers(self) -> BlockReader:
        reader = self._reader
        # Locks and open files must not be shared with a process that was forked off.
        if reader is None or reader.process != os.getpid():
            reader = BlockReader(self.files, self._indexes, self.kind, self._columns, self._cache_bytes)
            self._reader = reader
        return reader


def _agreed_format(files: Sequence[DataFile]) -> str:
    kinds: dict[str, str] = {}
    for file in files:
        kind = format_of(file.path)
        if kind is None:
            known = ", ".join(suffix for suffixes in FORMATS.values() for suffix in suffixes)
            raise file.error(
                f"the name does not tell its format; known: {known}, also with .gz, .zst or .xz behind",
                hint=f"pass format=, one of {', '.join(FORMATS)}",
            )
        kinds.setdefault(kind, file.name)
    if len(kinds) > 1:
        shown = ", ".join(f"{kind} ({name})" for kind, name in kinds.items())
        raise DataError(f"the files are of different formats: {shown}.", hint="open each format apart")
    return next(iter(kinds))


def _listed(files: Sequence[DataFile]) -> str:
    names = ", ".join(file.name for file in files[:3])
    return names if len(files) <= 3 else f"{names} and {len(files) - 3} more"
