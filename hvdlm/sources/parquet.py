"""Rows of Parquet files: a block is a row group or, since those are often large, a part of one.

A row group is read from its start, part by part, by a reader that stays where it is until the next part is asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from hvdlm.sources.files import DataFile, need

__all__ = ["PartReader", "layout", "read_group"]

_WHOLE = 4
"""Row groups of up to so many times the size of a block are blocks themselves."""
_BUFFER = 1 << 17


def layout(file: DataFile, block_bytes: int) -> tuple[list[int], list[int], str]:
    """Where the blocks of a file are.

    Returns:
        The first row of each block and, behind them, the number of rows; the row group of each block; the schema.

    Raises:
        DataError: The file cannot be read, is truncated, or is no Parquet.
    """
    with file.open() as source:
        opened = _reader(file, source, None)
        metadata = opened.metadata
        rows, groups = [0], []
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            parts = -(-group.total_byte_size // block_bytes)
            step = max(1, -(-group.num_rows // parts)) if parts > _WHOLE else max(1, group.num_rows)
            for start in range(0, group.num_rows, step):
                rows.append(rows[-1] + min(step, group.num_rows - start))
                groups.append(number)
        schema = "; ".join(f"{field.name}: {field.type}" for field in opened.schema_arrow)
    return rows, groups, schema


def read_group(file: DataFile, group: int, columns: list[str] | None, metadata: Any, row: int) -> tuple[Any, Any]:
    """A row group as a pyarrow table, and the file's metadata, to be given the next time.

    Raises:
        DataError: The file cannot be read, has changed or is damaged; names ``row``.
    """
    with _damage(file, row), file.open() as source:
        reader = _reader(file, source, metadata)
        return reader.read_row_group(group, columns=columns, use_threads=False), reader.metadata


class PartReader:
    """One row group, part by part.

    Args:
        file: The file.
        group: The row group.
        rows: First row of each part and, behind them, the first of the next row group.
        columns: The columns to read; all if None.
        metadata: The file's, if it is known.
    """

    def __init__(
        self, file: DataFile, group: int, rows: Sequence[int], columns: list[str] | None, metadata: Any
    ) -> None:
        self._file, self._rows = file, rows
        self.next_part = 0
        """The part that is read next."""
        self._ahead: list[Any] = []
        self._source = file.open()
        try:
            with _damage(file, rows[0]):
                # A buffer makes it read pages, not whole columns.
                opened = _reader(file, self._source, metadata, buffer_size=_BUFFER)
                self.metadata = opened.metadata
                step = max(1, rows[1] - rows[0])
                self._batches = opened.iter_batches(step, row_groups=[group], columns=columns, use_threads=False)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._source.close()

    def read(self) -> Any:
        """The pyarrow table of the next part.

        Raises:
            DataError: The file cannot be read, or is damaged.
        """
        row, until = self._rows[self.next_part], self._rows[self.next_part + 1]
        with _damage(self._file, row):
            while sum(batch.num_rows for batch in self._ahead) < until - row:
                self._ahead.append(next(self._batches))
        table = need("pyarrow", "reading Parquet").Table.from_batches(self._ahead)
        self._ahead = table.slice(until - row).to_batches()
        self.next_part += 1
        return table.slice(0, until - row)


@contextlib.contextmanager
def _damage(file: DataFile, row: int) -> Iterator[None]:
    arrow = need("pyarrow", "reading Parquet")
    try:
        yield
    except (arrow.ArrowException, OSError, StopIteration) as error:
        raise file.error(
            f"cannot be read ({error or 'rows are missing'})", row, hint="write or copy the file again"
        ) from error


def _reader(file: DataFile, source: Any, metadata: Any, buffer_size: int = 0) -> Any:
    """A ``pyarrow.parquet.ParquetFile`` over an open file."""
    arrow, parquet = need("pyarrow", "reading Parquet"), need("pyarrow.parquet", "reading Parquet")
    try:
        return parquet.ParquetFile(source, metadata=metadata, buffer_size=buffer_size)
    except (arrow.ArrowException, OSError) as error:
        raise file.error(
            f"cannot be read as Parquet ({str(error).splitlines()[0]}): it is truncated, damaged or of another format",
            hint="write or copy the file again",
        ) from error
