"""Rows of different lengths as rectangular arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdlm.errors import ConfigError, DataError

__all__ = ["IGNORED", "pad_batch"]

IGNORED = -100
"""The label that the losses of PyTorch and Transformers leave out."""


def pad_batch(
    rows: Sequence[Any],
    *,
    pad: int = 0,
    pads: Mapping[str, int] | None = None,
    multiple_of: int = 1,
    max_length: int | None = None,
    side: str = "right",
) -> dict[str, npt.NDArray[Any]]:
    """Pad the rows of a batch to one length; a collate function in NumPy, so that it serves every framework.

    >>> batch = pad_batch([[5, 6, 7], [8]])
    >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist()
    ([[5, 6, 7], [8, 0, 0]], [[1, 1, 1], [1, 0, 0]])

    In a torch DataLoader: ``collate_fn=lambda rows: {k: torch.from_numpy(v) for k, v in pad_batch(rows).items()}``.

    Args:
        rows: Sequences of token ids, or dicts of sequences and numbers by name. Each name has its own length.
        pad: What ``input_ids`` and other names are filled up with. ``attention_mask`` is filled with 0 and ``labels``
            with -100, which losses ignore.
        pads: Other fillings, by name.
        multiple_of: Round lengths up, to have fewer shapes or aligned ones.
        max_length: Cut longer rows, at the end.
        side: Where to pad: ``right`` or ``left`` (for generation).

    Returns:
        Arrays by name; sequences with shape (rows, length), numbers with shape (rows,). An ``attention_mask`` (int64)
        is made for ``input_ids`` if the rows have none.

    Raises:
        ConfigError: An argument is out of range.
        DataError: There are no rows, or they do not fit together; says which.
    """
    if side not in ("right", "left"):
        raise ConfigError(f"side is {side!r}; allowed: right, left.")
    if multiple_of < 1 or (max_length is not None and max_length < 1):
        raise ConfigError(f"multiple_of is {multiple_of} and max_length {max_length}; allowed: 1 or more.")
    if not len(rows):
        raise DataError("there are no rows to pad.", hint="leave empty batches out")
    named = [row if isinstance(row, Mapping) else {"input_ids": row} for row in rows]
    names = list(named[0])
    fillings = {"attention_mask": 0, "labels": IGNORED, **(pads or {})}
    for number, row in enumerate(named):
        if set(row) != set(names):
            raise DataError(
                f"row {number} of the batch has {sorted(map(str, row))}, row 0 has {sorted(map(str, names))}.",
                hint="give all rows the same names",
            )
    result: dict[str, npt.NDArray[Any]] = {}
    for name in names:
        columns = [_array(row[name], name, number) for number, row in enumerate(named)]
        if len({column.ndim for column in columns}) > 1:
            raise DataError(f"{name!r} is a number in some rows and a sequence in others.")
        if columns[0].ndim == 0:
            result[name] = np.stack(columns)
            continue
        columns = [column[:max_length] for column in columns]
        length = max(1, *(len(column) for column in columns))
        length = -(-length // multiple_of) * multiple_of
        result[name] = _padded(columns, length, fillings.get(name, pad), side)
        if name == "input_ids" and "attention_mask" not in names:
            result["attention_mask"] = _padded([np.ones(len(c), dtype=np.int64) for c in columns], length, 0, side)
    return result


def _array(value: Any, name: str, number: int) -> npt.NDArray[Any]:
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.empty((), dtype=object)
    if array.size == 0 and array.ndim == 1 and array.dtype.kind == "f":
        array = array.astype(np.int64)  # what NumPy makes of an empty list
    if array.ndim > 1 or array.dtype.kind not in "biuf":
        raise DataError(
            f"{name!r} in row {number} of the batch is neither a number nor a sequence of numbers.",
            hint="turn the rows into token ids before they are padded",
        )
    return array


def _padded(columns: Sequence[npt.NDArray[Any]], length: int, filling: int, side: str) -> npt.NDArray[Any]:
    result = np.full((len(columns), length), filling, dtype=np.result_type(*columns))
    for row, column in zip(result, columns, strict=True):
        if side == "right":
            row[: len(column)] = column
        else:
            row[length - len(column) :] = column
    return result
