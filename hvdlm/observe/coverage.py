"""Which samples of an epoch the workers saw together: none missing, none twice.

Each worker adds up a 64-bit hash of each id it was given. The sums over workers equal those of the planned ids exactly
if the multisets do, up to a chance of 2**-64 (Bellare & Micciancio 1997, additive multiset hashing), so that the usual
epoch costs one collective of two numbers. Where they differ, the ids are counted one by one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hvdlm.algorithms.hashing import mix64

__all__ = ["Coverage", "expected_sum"]

Ids = npt.NDArray[np.int64]
_CHUNK = 1 << 20
_FLUSH = 1 << 14
_MAX_COUNTED = 1 << 24
_SEED = 0x5EED


def expected_sum(num_samples: int) -> int:
    """Sum of the hashes of the ids 0 .. num_samples - 1, modulo 2**64."""
    total = 0
    for start in range(0, num_samples, _CHUNK):
        total += _sum(np.arange(start, min(start + _CHUNK, num_samples), dtype=np.int64))
    return total % 2**64


def _sum(ids: Ids) -> int:
    return int(mix64(ids, _SEED).sum(dtype=np.uint64))


class Coverage:
    """Ids that this worker was given in one epoch of one loader.

    Args:
        num_samples: Samples in the data set.
        num_planned: Samples that the epoch trains on (all but a dropped last batch).
        before: What :meth:`total` gave in the run that this one goes on with.
    """

    def __init__(self, num_samples: int, num_planned: int, before: tuple[int, int] = (0, 0)) -> None:
        self.num_samples, self.num_planned = num_samples, num_planned
        self._before = before
        self._recent: list[Ids] = []
        self._num_recent = 0
        self._count = self._hash = 0
        # One by one only where that is cheap; a larger set is still proven complete by the sums.
        self._seen = np.zeros(num_samples, dtype=np.uint8) if num_samples <= _MAX_COUNTED else None

    def add(self, ids: Ids) -> None:
        """Count ids as seen by this worker."""
        self._recent.append(ids)
        self._num_recent += len(ids)
        if self._num_recent >= _FLUSH:
            self._flush()

    def _flush(self) -> None:
        if self._recent:
            ids = np.concatenate(self._recent)
            self._recent, self._num_recent = [], 0
            self._count += len(ids)
            self._hash = (self._hash + _sum(ids)) % 2**64
            if self._seen is not None:
                np.add.at(self._seen, ids, 1)

    def total(self, allreduce: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]) -> tuple[int, int]:
        """(ids, sum of their hashes modulo 2**64) that all workers were given so far; equal on all ranks.

        Args:
            allreduce: Sum of an int64 array over ranks.
        """
        self._flush()
        # Halves, since int64 cannot carry a sum of uint64 over ranks.
        sums = allreduce(np.array([self._count, self._hash & 0xFFFFFFFF, self._hash >> 32], dtype=np.int64))
        count, sum_of_hashes = self._before
        return count + int(sums[0]), (sum_of_hashes + int(sums[1]) + (int(sums[2]) << 32)) % 2**64

    def missing_and_repeated(
        self, allreduce: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]], all_ids_sum: int
    ) -> tuple[int, int] | None:
        """How many planned samples no worker saw, and how often one was seen again; equal on all ranks.

        Args:
            allreduce: Sum of an int64 array over ranks.
            all_ids_sum: :func:`expected_sum` of the data set.

        Returns:
            None where the sums differ and the data set is too large to count.
        """
        count, total = self.total(allreduce)
        if self.num_planned == self.num_samples and count == self.num_samples and total == all_ids_sum:
            return 0, 0
        if self._seen is None:
            # Of a part of a large epoch (it was gone on with, or its last batch dropped) only the number is known.
            is_part = self.num_planned < self.num_samples
            return (0, 0) if is_part and count == self.num_planned else None
        counts = allreduce(self._seen.astype(np.int64))
        repeated = int((counts - 1).clip(min=0).sum())
        return max(0, self.num_planned - self._before[0] - int((counts > 0).sum())), repeated
