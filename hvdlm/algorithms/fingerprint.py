"""Finds which replicas differ, and in what, from a 64-bit digest of each tensor on each rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Difference", "differences", "majority"]


@dataclass(frozen=True)
class Difference:
    """A tensor that is not the same on all ranks."""

    index: int
    """Its place in the list of tensors."""
    odd: tuple[int, ...]
    """Ranks that hold something else than most."""
    root: int
    """The lowest rank that holds what most hold."""


def majority(digests: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """(lowest rank of the largest group of equal digests, the ranks outside of it).

    Where groups are equally large, that of the lowest rank is taken: with two workers, rank 0 is right.

    >>> majority([7, 9, 7]), majority([1, 2])
    ((0, (1,)), (0, (1,)))
    """
    groups: dict[int, list[int]] = {}
    for rank, digest in enumerate(digests):
        groups.setdefault(digest, []).append(rank)
    most = max(groups.values(), key=lambda ranks: (len(ranks), -ranks[0]))
    return most[0], tuple(rank for rank in range(len(digests)) if rank not in set(most))


def differences(table: Sequence[Sequence[int]]) -> list[Difference]:
    """The tensors that differ, in the order of the model.

    Args:
        table: ``table[rank][i]`` is the digest of tensor ``i``; all ranks have as many.

    >>> differences([[5, 6, 7], [5, 0, 7]])
    [Difference(index=1, odd=(1,), root=0)]
    """
    found = []
    for index, column in enumerate(zip(*table, strict=True)):
        if len(set(column)) > 1:
            root, odd = majority(column)
            found.append(Difference(index, odd, root))
    return found
