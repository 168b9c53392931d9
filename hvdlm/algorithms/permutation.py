"""A random order of any number of samples that takes no memory and can be entered anywhere.

A Feistel network with keyed rounds is a permutation of a power of two; walking its cycle until the value is below
``size`` makes it one of [0, size) (Black & Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). The halves
may differ by one bit (Schneier & Kelsey, "Unbalanced Feistel networks and block cipher design", FSE 1996), so the power
of two is less than twice ``size`` and a walk has fewer than two steps on average. Not for secrets: the rounds are fast
hashes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hvdlm.algorithms.hashing import mix64

__all__ = ["MAX_SIZE", "ROUNDS", "KeyedPermutation", "feistel"]

Ids = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint32]

MAX_SIZE = 1 << 62
"""The largest size of a permutation."""

ROUNDS = 6
"""Rounds of the network. Four would do with perfect round functions (Luby & Rackoff, SIAM J. Comput. 1988)."""

_TABLE_SIZE = 1 << 12
"""Up to this size the order is made by sorting hashes: uniform over all permutations, which few-bit halves are not."""

_CHUNK = 1 << 15
"""Values permuted at once, so that the working arrays stay in the core's cache."""

_FIRST = np.uint32(0x7FEB352D)
_SECOND = np.uint32(0x846CA68B)


def feistel(
    values: npt.NDArray[np.int64], bits: int, round_keys: Sequence[np.uint32] | Words, inverse: bool = False
) -> npt.NDArray[np.int64]:
    """Permute [0, 2**bits) by a keyed Feistel network.

    Args:
        values: int64, shape (n,), each in [0, 2**bits).
        bits: 2 to 62.
        round_keys: uint32, shape (rounds,), or (rounds, n) for a permutation of its own for each value.
        inverse: Whether to undo the permutation.

    Returns:
        int64, shape (n,).
    """
    low_bits = (bits + 1) // 2
    low = (values & ((1 << low_bits) - 1)).astype(np.uint32)
    high = (values >> low_bits).astype(np.uint32)
    mixed, scratch = np.empty_like(low), np.empty_like(low)
    numbers = range(len(round_keys))
    for number in reversed(numbers) if inverse else numbers:
        if number % 2:
            source, target, target_bits = high, low, low_bits
        else:
            source, target, target_bits = low, high, bits - low_bits
        np.multiply(source, _FIRST, out=mixed)
        mixed += round_keys[number]
        np.right_shift(mixed, np.uint32(15), out=scratch)
        mixed ^= scratch
        mixed *= _SECOND
        # The high bits of a product depend on all bits of its factors, the low ones do not.
        mixed >>= np.uint32(32 - target_bits)
        target ^= mixed
    result = high.astype(np.int64)
    result <<= low_bits
    result |= low
    return result


class KeyedPermutation:
    """A permutation of [0, size) chosen by a key; position -> sample id, for any positions in any order.

    >>> order = KeyedPermutation(10, key=3)
    >>> order(np.arange(10)).tolist()
    [3, 9, 2, 7, 8, 6, 1, 0, 4, 5]
    >>> order.inverse(order(np.array([4, 2]))).tolist()
    [4, 2]

    Args:
        size: Number of elements, 1 to 2**62.
        key: Any integer; taken modulo 2**64. See :func:`hvdlm.algorithms.hashing.derive_seed`.

    Raises:
        ValueError: The size is out of range.
    """

    __slots__ = ("_bits", "_round_keys", "_table", "key", "size")

    def __init__(self, size: int, key: int) -> None:
        if not 1 <= size <= MAX_SIZE:
            raise ValueError(f"the size of a permutation is {size}; allowed: 1 to 2**62")
        self.size = size
        self.key = key
        self._table: Ids | None = None
        if size <= _TABLE_SIZE:
            # No two hashes are equal, so that any way of sorting gives the same.
            self._table = np.argsort(mix64(np.arange(size, dtype=np.int64), key)).astype(np.int64, copy=False)
        self._bits = max(2, (size - 1).bit_length())
        self._round_keys = (mix64(np.arange(ROUNDS, dtype=np.int64), key) >> np.uint64(32)).astype(np.uint32)

    def __repr__(self) -> str:
        return f"KeyedPermutation(size={self.size}, key={self.key})"

    def __call__(self, positions: Ids) -> Ids:
        """The elements at some positions.

        Args:
            positions: int64, shape (n,), each in [0, size).

        Returns:
            int64, shape (n,).

        Raises:
            IndexError: A position is out of range.
        """
        return self._map(positions, inverse=False)

    def inverse(self, elements: Ids) -> Ids:
        """The positions at which some elements are: ``inverse(p(x)) == x``.

        Args:
            elements: int64, shape (n,), each in [0, size).

        Returns:
            int64, shape (n,).

        Raises:
            IndexError: An element is out of range.
        """
        return self._map(elements, inverse=True)

    def _map(self, values: Ids, inverse: bool) -> Ids:
        values = np.asarray(values, dtype=np.int64)
        if len(values) and (values.min() < 0 or values.max() >= self.size):
            raise IndexError(f"values from {values.min()} to {values.max()} are not all in [0, {self.size})")
        if self._table is not None:
            table = np.argsort(self._table) if inverse else self._table
            return table[values]
        result = np.empty(len(values), dtype=np.int64)
        for start in range(0, len(values), _CHUNK):
            result[start : start + _CHUNK] = feistel(
                values[start : start + _CHUNK], self._bits, self._round_keys, inverse
            )
        outside = np.flatnonzero(result >= self.size)
        while len(outside):
            walked = feistel(result[outside], self._bits, self._round_keys, inverse)
            result[outside] = walked
            outside = outside[walked >= self.size]
        return result
