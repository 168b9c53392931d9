"""Keys that place samples: what a column or a function of the person's says, as hashes, computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdlm.agreement import agree
from hvdlm.algorithms.hashing import hash_key
from hvdlm.algorithms.ledger import digest_of
from hvdlm.contracts import Collectives
from hvdlm.errors import DataError

__all__ = ["Keys", "make_keys"]

Ids = npt.NDArray[np.int64]

_PROBES = 256
"""Keys that ranks compare before the first batch."""


class Keys:
    """Sample id -> key hash. Each key is asked for once, when its sample is first placed.

    >>> keys = Keys(lambda index: "ab"[index // 3], 6, "data")
    >>> hashes = keys(np.arange(6))
    >>> (hashes[:3] == hashes[0]).all(), hashes[0] == hashes[3]
    (np.True_, np.False_)

    Args:
        function: Index of a sample -> int, str or bytes.
        num_samples: Samples in the data set.
        name: Of the loader, for messages.
    """

    def __init__(self, function: Callable[[int], Any], num_samples: int, name: str) -> None:
        self._function, self._name = function, name
        self._hashes = np.empty(num_samples, dtype=np.int64)
        self._known = np.zeros(num_samples, dtype=bool)

    def __call__(self, ids: Ids) -> Ids:
        """The key hash of each id, int64, shape (n,).

        Raises:
            DataError: The function raised, or gave what cannot be a key; says for which sample.
        """
        new = ids[~self._known[ids]]
        if len(new):
            self._hashes[new] = np.fromiter((self._hash(index) for index in new.tolist()), np.int64, len(new))
            self._known[new] = True
        return self._hashes[ids]

    @classmethod
    def from_hashes(cls, hashes: Ids, name: str) -> Keys:
        """Those of a column that was read already."""
        keys = cls(lambda index: index, 0, name)
        keys._hashes, keys._known = hashes, np.ones(len(hashes), dtype=bool)
        return keys

    def known(self) -> Ids:
        """The key hashes of all samples placed so far."""
        return self._hashes[self._known]

    def _hash(self, index: int) -> int:
        try:
            key = self._function(index)
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"{self._name}: the key of sample {index} cannot be had: {type(error).__name__}: {error}.",
                hint="key takes an index from 0 to the number of samples - 1 and gives an int, str or bytes",
            ) from error
        try:
            return hash_key(key)
        except TypeError as error:
            raise DataError(
                f"{self._name}: {error} (sample {index}).", hint="give an int or text that names the document"
            ) from None


def make_keys(
    key: str | Callable[[int], Any], dataset: Any, name: str, collectives: Collectives, is_main: bool
) -> Keys | None:
    """What places the samples of a map-style data set; None for the id itself. Every rank calls it.

    A column is read by rank 0 alone, once through; the others are sent its hashes.

    Args:
        key: The option.
        dataset: Has ``__len__`` and ``__getitem__``.
        name: Of the loader, for messages.
        collectives: To send a column's hashes, and to compare a function's.
        is_main: Whether this is rank 0.

    Raises:
        DataError: A key cannot be had.
        MismatchError: A function gives other keys on other ranks.
    """
    if key == "none":
        return None
    num = len(dataset)
    every = np.arange(num, dtype=np.int64)
    if callable(key):
        keys = Keys(key, num, name)
        probes = np.unique(every[:: max(1, num // _PROBES)])
        lines = [f"{name}: the keys of {len(probes)} samples are {digest_of([keys(probes).tobytes()])}"]
        agree(collectives, lines)
        return keys
    keys = Keys(lambda index: _column(dataset, index, key), num, name)
    message, payload = b"", b""
    if is_main:
        try:
            payload = keys(every).tobytes()
        except DataError as error:  # the others must not wait for ever
            message = b"!" + str(error.message).encode()
    payload = collectives.broadcast(message or b"=" + payload)
    if payload[:1] == b"!":
        raise DataError(payload[1:].decode(), hint=f"check the column that key={key!r} names")
    hashes = np.frombuffer(payload, dtype=np.int64, offset=1)
    return Keys.from_hashes(hashes, name)


def _column(dataset: Any, index: int, column: str) -> Any:
    row = dataset[index]
    if not isinstance(row, Mapping):
        raise DataError(f"sample {index} is a {type(row).__name__}, which has no column {column!r}.")
    if column not in row:
        raise DataError(f"sample {index} has no column {column!r}; it has: {', '.join(map(repr, row))}.")
    value = row[column]
    return value.item() if hasattr(value, "item") else value  # a tensor or array of one element
