"""Dask collections, written once as sharded Parquet files for :mod:`hvdlm.sources`."""

from __future__ import annotations

import posixpath
import uuid
from typing import Any

from hvdlm.clusters.functions import Rows
from hvdlm.errors import ConfigError, DataError

__all__ = ["write_collection"]


def write_collection(client: Any, value: Any, data_dir: str | None, number: int) -> Rows | None:
    """Write a Dask DataFrame, Bag or Array, one file for each partition; None for any other value.

    A row is a dict by column; of a Bag of dicts likewise, of other Bags and of Arrays it is ``{"value": ...}`` for each
    element along the first axis.

    Args:
        client: The ``distributed.Client``.
        value: Any argument of a train function.
        data_dir: Where to write.
        number: The argument's place, for the directory's name.

    Raises:
        ConfigError: It is a collection, and ``data_dir`` is None.
        DataError: It is a collection of another kind.
    """
    import dask

    if not dask.is_dask_collection(value):
        return None
    if data_dir is None:
        raise ConfigError(
            f"argument {number} is a Dask {type(value).__name__}; where its rows are to be written was not given.",
            hint='hvdlm.dask.run(..., data_dir="/shared/rows"), a directory or URL that all workers reach',
        )
    parts = _partitions(value)
    directory = posixpath.join(str(data_dir), f"{number}-{uuid.uuid4().hex[:8]}")
    write = dask.delayed(_write_part, pure=False)
    counts = client.compute([write(part, directory, index) for index, part in enumerate(parts)], sync=True)
    if not sum(counts):
        raise DataError(f"argument {number}, a Dask {type(value).__name__}, has no rows.")
    return Rows(posixpath.join(directory, "*.parquet"))


def _partitions(value: Any) -> list[Any]:
    kind = f"{type(value).__module__}.{type(value).__name__}"
    if hasattr(value, "rechunk"):
        # Rows stay whole: chunks along the first axis only.
        whole = value.rechunk(dict.fromkeys(range(1, value.ndim), -1))
        return list(whole.to_delayed().ravel())
    if hasattr(value, "to_delayed"):
        return list(value.to_delayed())
    raise DataError(
        f"{kind} cannot be written as rows; a Dask DataFrame, Bag or Array can.", hint="compute it first: x.compute()"
    )


def _write_part(part: Any, directory: str, index: int) -> int:
    """Write one partition; returns its number of rows."""
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

    if hasattr(part, "columns"):
        table = pa.Table.from_pandas(part, preserve_index=False)
    elif hasattr(part, "to_frame"):
        table = pa.Table.from_pandas(part.to_frame(part.name or "value"), preserve_index=False)
    elif hasattr(part, "ndim"):
        table = pa.table({"value": pa.array(part.tolist())})
    else:
        rows = list(part)
        table = pa.Table.from_pylist([row if isinstance(row, dict) else {"value": row} for row in rows])
    if table.num_rows:
        system, path = fsspec.core.url_to_fs(directory)
        system.makedirs(path, exist_ok=True)
        with system.open(posixpath.join(path, f"part-{index:06}.parquet"), "wb") as file:
            pq.write_table(table, file)
    return int(table.num_rows)
