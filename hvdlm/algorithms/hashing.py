"""Hashes that are equal on every machine, in every process and under every Python version.

Integers go through the finaliser of SplitMix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014) with the constants of Stafford's variant 13; text and bytes through BLAKE2b (Aumasson, Neves,
Wilcox-O'Hearn & Winnerlein, "BLAKE2: simpler, smaller, fast as MD5", ACNS 2013). Python's own ``hash()`` is salted in
each process.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

__all__ = ["Key", "derive_seed", "hash_key", "hash_keys", "mix64"]

Key = SupportsIndex | str | bytes
"""What can name a sample or a document."""

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def _mix(value: int) -> int:
    """SplitMix64's finaliser of one Python integer, modulo 2**64."""
    value = (value + _GAMMA) & _MASK
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def mix64(values: npt.NDArray[np.int64] | npt.NDArray[np.uint64], seed: int = 0) -> npt.NDArray[np.uint64]:
    """A well mixed 64-bit hash of each integer; for one seed, no two integers share a hash.

    Args:
        values: int64 or uint64, any shape. Equal bit patterns have equal hashes.
        seed: Any integer; taken modulo 2**64.

    Returns:
        uint64, the shape of ``values``.

    >>> [hex(h) for h in mix64(np.arange(2), seed=7).tolist()]
    ['0x74b5abcc66b8bdc1', '0x3ca4fbd2393808bc']
    """
    mixed = np.array(values, dtype=np.int64 if values.dtype.kind == "i" else np.uint64).view(np.uint64)
    scratch = np.empty_like(mixed)
    # The seed is mixed too: with seeds added as they are, the hashes under seed + 1 would be those under seed, shifted.
    mixed += np.uint64(_mix(seed))
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        np.right_shift(mixed, np.uint64(shift), out=scratch)
        mixed ^= scratch
        mixed *= np.uint64(factor)
    np.right_shift(mixed, np.uint64(31), out=scratch)
    mixed ^= scratch
    return mixed


def hash_key(key: Key) -> int:
    """A signed 64-bit integer that stands for a key, to be placed like a sample id.

    An integer that fits into 64 bits stands for itself, so ``key=lambda index: index`` is the same as no key at all.

    Args:
        key: An integer (also NumPy's), text or bytes.

    Raises:
        TypeError: The key is of another type.

    >>> hash_key(12), hash_key("twelve")
    (12, 8997365504432933196)
    """
    if isinstance(key, str):
        return _digest(b"s" + key.encode("utf-8", "surrogatepass"))
    if isinstance(key, (bytes, bytearray, memoryview)):
        return _digest(b"b" + bytes(key))
    try:
        number = operator.index(key)
    except TypeError:
        raise TypeError(f"a key is {_short(key)}, a {type(key).__name__}; allowed: int, str or bytes") from None
    if -(1 << 63) <= number < 1 << 63:
        return number
    return _digest(b"i" + str(number).encode())


def hash_keys(keys: Iterable[Key]) -> npt.NDArray[np.int64]:
    """:func:`hash_key` of each key.

    Args:
        keys: Integers, text or bytes, also mixed. An integer array is passed through.

    Returns:
        int64, shape (n,).

    Raises:
        TypeError: A key is of another type.
    """
    if isinstance(keys, np.ndarray) and keys.dtype.kind == "i":
        return keys.astype(np.int64)
    return np.fromiter((hash_key(key) for key in keys), dtype=np.int64)


def derive_seed(*parts: int | str) -> int:
    """A seed for one purpose from the parts that name it; different parts give unrelated seeds.

    Args:
        parts: For example a purpose, the run's seed and an epoch number.

    Returns:
        An integer in [0, 2**64).

    Raises:
        TypeError: A part is neither int nor str.

    >>> derive_seed("order", 0, 3) == derive_seed("order", 0, 3) != derive_seed("order", 3, 0)
    True
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        text = part if isinstance(part, str) else str(operator.index(part))
        encoded = text.encode("utf-8", "surrogatepass")
        # Kind and length first: ("1", 2) differs from (1, 2), and ("ab", "c") from ("a", "bc").
        digest.update(b"%c%d:" % (b"s" if isinstance(part, str) else b"i", len(encoded)) + encoded)
    return int.from_bytes(digest.digest(), "little")


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
