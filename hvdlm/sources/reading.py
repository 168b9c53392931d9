"""Blocks in memory: the most recent ones up to a size, and the cursors that compressed files are read on by."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from hvdlm.sources.compressed import Cursor
from hvdlm.sources.files import DataFile
from hvdlm.sources.index import FileIndex
from hvdlm.sources.parquet import PartReader, read_group
from hvdlm.sources.rows import row_format

__all__ = ["BlockReader"]

_MAX_CURSORS = 48
"""Cursors kept: one for each lane of a block order, and some to spare. A gzip cursor takes 0.4 MB, one of zstd or xz
the window it was compressed with too, one of Parquet a page of each column."""
_MAX_FOOTERS = 8
"""Parquet files whose footer is kept."""
_NEAR = 8
"""Blocks a cursor may skip, which are kept on the way; further ahead another one is started, since this one will be
read on from where it is."""
_AGAIN = "write or copy the file again"

Block = tuple[Any, Any]
"""Bytes and the bounds of rows in them, or a table and None."""


class BlockReader:
    """Rows by file and number in the file; threads may share one.

    It holds no open file but for Parquet row groups that are read in parts.

    Args:
        files: The files.
        indexes: The index of each.
        kind: Their format.
        columns: The columns to read of Parquet files; all if None.
        cache_bytes: Blocks are kept in memory up to this size.
    """

    def __init__(
        self,
        files: Sequence[DataFile],
        indexes: Sequence[FileIndex],
        kind: str,
        columns: list[str] | None,
        cache_bytes: int,
    ) -> None:
        self._files, self._indexes, self._columns = files, indexes, columns
        self._format = None if kind == "parquet" else row_format(kind)
        self._cache_bytes = cache_bytes
        self._blocks: OrderedDict[tuple[int, int], tuple[Block, int]] = OrderedDict()
        self._held = 0
        self._cursors: OrderedDict[Cursor, int] = OrderedDict()
        self._parts: OrderedDict[PartReader, tuple[int, int]] = OrderedDict()
        self._footers: OrderedDict[int, Any] = OrderedDict()
        self._checked: set[int] = set()
        self._lock = threading.Lock()
        self.process = os.getpid()
        """Where it was made: a process that is forked off it needs one of its own."""

    def row(self, file: int, row: int) -> Any:
        """What a row holds."""
        index = self._indexes[file]
        number = int(np.searchsorted(index.rows, row, side="right")) - 1
        with self._lock:
            data, bounds = self._block(file, number, row)
        within = row - int(index.rows[number])
        if self._format is None:
            return {name: data.column(name)[within].as_py() for name in data.column_names}
        start, end = bounds[within]
        return self._format.value(data[start:end], self._files[file], row)

    def close(self) -> None:
        """Forget all blocks and cursors."""
        with self._lock:
            self._blocks.clear()
            self._cursors.clear()
            self._held = 0
            for reader in self._parts:
                reader.close()
            self._parts.clear()

    def _block(self, file: int, number: int, row: int) -> Block:
        kept = self._blocks.get((file, number))
        if kept is not None:
            self._blocks.move_to_end((file, number))
            return kept[0]
        if file not in self._checked:
            self._files[file].check()
            self._checked.add(file)
        if self._format is None:
            return self._table(file, number)
        if self._indexes[file].codec:
            return self._decompressed(file, number, row)
        start, end = self._indexes[file].places[number : number + 2].tolist()
        return self._split(file, number, self._files[file].read(start, end, row), row)

    def _keep(self, file: int, number: int, block: Block, size: int) -> Block:
        _, old = self._blocks.pop((file, number), (None, 0))
        self._blocks[file, number] = block, size
        self._held += size - old
        while self._held > self._cache_bytes and len(self._blocks) > 1:
            _, (_, size) = self._blocks.popitem(last=False)
            self._held -= size
        return block

    def _split(self, file: int, number: int, data: bytes, row: int) -> Block:
        """Keep a block whose bytes are at hand."""
        assert self._format is not None
        first, last = self._indexes[file].rows[number : number + 2].tolist()
        try:
            bounds: Any = self._format.split(data) if last > first else np.zeros((0, 2), dtype=np.int64)
            if len(bounds) != last - first:
                raise EOFError(f"this block has {len(bounds)} rows, and had {last - first} when it was indexed")
        except EOFError as error:
            raise self._files[file].error(str(error), row, hint=_AGAIN) from error
        if len(data) < 1 << 31:
            bounds = bounds.astype(np.int32)
        return self._keep(file, number, (data, bounds), len(data) + bounds.nbytes)

    def _table(self, file: int, number: int) -> Block:
        index, source = self._indexes[file], self._files[file]
        group = int(index.places[number])
        first, last = (int(np.searchsorted(index.places, group, side=side)) for side in ("left", "right"))
        footer = self._footers.get(file)
        if last - first == 1:
            table, footer = read_group(source, group, self._columns, footer, int(index.rows[number]))
            self._remember(file, footer)
            return self._keep(file, number, (table, None), table.nbytes)
        reader: PartReader | None = max(
            (
                reader
                for reader, of in self._parts.items()
                if of == (file, group) and reader.next_part <= number - first <= reader.next_part + _NEAR
            ),
            key=lambda reader: reader.next_part,
            default=None,
        )
        if reader is None:
            reader = PartReader(source, group, index.rows[first : last + 1].tolist(), self._columns, footer)
            self._remember(file, reader.metadata)
        self._parts.pop(reader, None)
        try:
            while reader.next_part <= number - first:
                part = first + reader.next_part
                table = reader.read()
                if part >= number - _NEAR:
                    self._keep(file, part, (table, None), table.nbytes)
        except BaseException:
            reader.close()
            raise
        self._parts[reader] = file, group
        if len(self._parts) > _MAX_CURSORS:
            self._parts.popitem(last=False)[0].close()
        return table, None

    def _remember(self, file: int, footer: Any) -> None:
        self._footers.pop(file, None)
        self._footers[file] = footer
        if len(self._footers) > _MAX_FOOTERS:
            self._footers.popitem(last=False)

    def _decompressed(self, file: int, number: int, row: int) -> Block:
        """Read on to a block. Those just before it are kept too: they are of the same window of an order."""
        places = self._indexes[file].places
        cursor = self._cursor(file, number)
        near = int(np.searchsorted(places, cursor.next_place))
        self._cursors.pop(cursor, None)
        for other in range(min(max(near, number - _NEAR), number), number + 1):
            start, end = places[other : other + 2].tolist()
            try:
                data = cursor.read(start, end)
            except EOFError as error:
                raise self._files[file].error(str(error), row, hint=_AGAIN) from error
            block = self._split(file, other, data, row)
        # Only a cursor that did not fail is kept.
        self._cursors[cursor] = file
        if len(self._cursors) > _MAX_CURSORS:
            self._cursors.popitem(last=False)
        return block

    def _cursor(self, file: int, number: int) -> Cursor:
        """The cursor that has the shortest way to a block."""
        index, source = self._indexes[file], self._files[file]
        start = int(index.places[number])
        point = int(np.searchsorted(index.points[:, 1], start, side="right")) - 1
        near = int(index.places[max(0, number - _NEAR)])
        best: Cursor | None = max(
            (cursor for cursor, of in self._cursors.items() if of == file and cursor.next_place <= start),
            key=lambda cursor: cursor.next_place,
            default=None,
        )
        if best is not None and best.next_place < index.points[point, 1]:
            best = None
        if best is not None and best.next_place < near:
            best = best.fork()
        return best or Cursor(source, index.codec, index.points, point)
