"""The data plan: which samples make up each global batch, and which of them this worker computes.

Order and placement are separate. Order: position p of an epoch holds sample ``order(p)``; global batch t is positions
[tB, (t+1)B) whatever the number of workers. Placement: :mod:`hvdlm.algorithms.partition` cuts each batch among them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hvdlm.algorithms.hashing import derive_seed
from hvdlm.algorithms.partition import place, skew, split_shares
from hvdlm.algorithms.permutation import KeyedPermutation
from hvdlm.algorithms.rendezvous import slot_homes
from hvdlm.algorithms.slots import slot_counts, slot_of

__all__ = ["Epoch", "Partition", "Share"]

Ids = npt.NDArray[np.int64]

_BLOCK = 1 << 16
"""Positions planned at once: large enough for vectorised speed, small enough to stay in cache."""


class KeyHashes(Protocol):
    """What places samples by something else than their ids; :class:`hvdlm.keys.Keys`."""

    def __call__(self, ids: Ids, /) -> Ids:
        """The key hash of each id."""
        ...

    def known(self) -> Ids:
        """The key hashes of all samples placed so far."""
        ...


@dataclass(frozen=True)
class Share:
    """What one worker computes of one global batch."""

    ids: Ids
    """Sample ids; for an empty share one filler sample, so that the worker still takes part in the step."""
    count: int
    """How many of ``ids`` count: 0 for a filler."""
    total: int
    """Samples of the whole global batch."""
    weigh: Callable[[], float] | None = field(default=None, repr=False, compare=False)
    """What its gradient counts in the sum over workers, where that is not its part of the samples."""

    @property
    def fraction(self) -> float:
        """What its gradient counts in the sum over workers; the fractions of all workers add up to 1."""
        return self.count / self.total if self.weigh is None else self.weigh()

    @property
    def is_filler(self) -> bool:
        """Whether the ids only keep this worker in step."""
        return self.count == 0


@dataclass(frozen=True, kw_only=True)
class Partition:
    """How global batches are cut among workers; the same value on every rank except ``rank``."""

    strategy: str
    rank: int
    size: int
    seed: int
    weights: Sequence[float] = ()
    """Relative speed of each worker; equal if empty."""
    keys: KeyHashes | None = field(default=None, repr=False, compare=False)
    """Sample ids -> what places them under ``hash``: :class:`hvdlm.keys.Keys`; the ids themselves if None."""
    _homes: list[npt.NDArray[np.int32]] = field(default_factory=list, repr=False, compare=False)

    @property
    def shares(self) -> Sequence[float]:
        """One weight per worker."""
        return self.weights or [1.0] * self.size

    def weighted(self, weights: Sequence[float]) -> Partition:
        """The same, with other weights."""
        return replace(self, weights=weights, _homes=[])

    def homes(self) -> npt.NDArray[np.int32] | None:
        """Slot -> worker for ``hash``, made when first needed; None for other strategies."""
        if self.strategy != "hash" or self.size == 1:
            return None
        if not self._homes:
            self._homes.append(slot_homes(self.shares))
        return self._homes[0]

    def cut(self, ids: Ids, batch_size: int) -> Iterator[Share]:
        """This worker's share of each consecutive global batch in ``ids``.

        Args:
            ids: Sample ids in global order, shape (n,); batches start at 0, the last may be short.
            batch_size: Samples per global batch.
        """
        starts = range(0, len(ids), batch_size)
        if self.strategy == "none" or self.size == 1:
            for start in starts:
                batch = ids[start : start + batch_size]
                # Under "none" the global batch holds each sample once a worker.
                yield Share(batch, len(batch), len(batch) * self.size)
            return
        mine = self._places(ids, batch_size)
        bounds = np.searchsorted(mine, np.append(starts, len(ids)))
        for t, start in enumerate(starts):
            chosen = ids[mine[bounds[t] : bounds[t + 1]]]
            total = min(batch_size, len(ids) - start)
            if len(chosen):
                yield Share(chosen, len(chosen), total)
            else:
                yield Share(ids[start : start + 1], 0, total)

    def _places(self, ids: Ids, batch_size: int) -> Ids:
        homes = self.homes()
        keys = self.keys(ids) if self.keys is not None and homes is not None else None
        workers = place(ids, batch_size, self.strategy, self.shares, homes, self.seed, keys)
        return np.flatnonzero(workers == self.rank)

    def part_of(self, ids: Ids) -> tuple[Ids, Share]:
        """This worker's places in one global batch, and its share: what :meth:`cut` gives, for ids that may repeat.

        >>> rows, share = Partition(strategy="contiguous", rank=1, size=2, seed=0).part_of(np.array([7, 8, 9, 7]))
        >>> rows.tolist(), share.count
        ([2, 3], 2)

        Args:
            ids: Sample ids of the batch, shape (n,), n > 0.
        """
        if self.strategy == "none" or self.size == 1:
            return np.arange(len(ids)), Share(ids, len(ids), len(ids) * self.size)
        rows = self._places(ids, len(ids))
        if not len(rows):
            return np.zeros(1, dtype=np.int64), Share(ids[:1], 0, len(ids))
        return rows, Share(ids[rows], len(rows), len(ids))

    def home_skew(self, num_samples: int) -> float | None:
        """Largest over mean of a worker's homes per weight, 1 if even; None where samples have no homes.

        With keys, of the samples placed so far; None if there are none.
        """
        homes = self.homes()
        if homes is None:
            return None
        if self.keys is None:
            slots = slot_counts(num_samples, len(homes), self.seed)
        else:
            slots = np.bincount(slot_of(self.keys.known(), len(homes), self.seed), minlength=len(homes))
        if not slots.any():
            return None
        return skew(np.bincount(homes, weights=slots, minlength=self.size), self.shares)

    def counts(self, total: int) -> npt.NDArray[np.int64]:
        """Samples of a global batch of ``total`` that each worker computes."""
        return split_shares(total, self.shares)


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One pass over a data set of known length.

    Args:
        partition: How batches are cut.
        num_samples: Samples in the data set.
        batch_size: Samples per global batch.
        shuffle: Whether the order is a keyed permutation of the ids, or the ids in order.
        drop_last: Whether a short last batch is left out.
        number: Which epoch this is; gives the permutation its key.
        batches_done: Global batches that were trained on before, when a run goes on within the epoch.
        samples_done: Positions that these took. Their batch size may have been another one.
        block_order: Key and ``batch_size`` -> the order to shuffle in, of a data set whose samples lie in blocks:
            :meth:`hvdlm.sources.FileDataset.block_order`. A keyed permutation if None.
    """

    partition: Partition
    num_samples: int
    batch_size: int
    shuffle: bool
    drop_last: bool
    number: int
    batches_done: int = 0
    samples_done: int = 0
    block_order: Callable[..., Callable[[Ids], Ids]] | None = None

    def __len__(self) -> int:
        """Global batches in this epoch, with those done before."""
        full, rest = divmod(self.num_samples - self.samples_done, self.batch_size)
        return self.batches_done + full + (1 if rest and not self.drop_last else 0)

    @property
    def num_planned(self) -> int:
        """Samples of this epoch that are trained on: all of them but a dropped last batch."""
        return min(self._position(len(self)), self.num_samples)

    def _position(self, batch: int) -> int:
        return self.samples_done + (batch - self.batches_done) * self.batch_size

    def order(self, positions: Ids) -> Ids:
        """Sample id at each position of this epoch."""
        return self._shuffled(positions) if self.shuffle else positions

    @functools.cached_property
    def _shuffled(self) -> Callable[[Ids], Ids]:
        key = derive_seed("order", self.partition.seed, self.number)
        if self.block_order is not None:
            return self.block_order(key, batch_size=self.batch_size)
        return KeyedPermutation(self.num_samples, key)

    def shares(
        self, first_batch: int | None = None, partition_at: Callable[[int], Partition] | None = None
    ) -> Iterator[Share]:
        """This worker's share of each global batch.

        Args:
            first_batch: Where to begin; behind those done before if None.
            partition_at: How the batch of a number is cut, asked just before its share is given; as the epoch says if
                None. The same value must be the same object.
        """
        number = self.batches_done if first_batch is None else first_batch
        block = max(1, _BLOCK // self.batch_size) * self.batch_size
        while number < len(self):
            partition = self.partition if partition_at is None else partition_at(number)
            start = self._position(number)
            positions = np.arange(start, min(start + block, self.num_planned), dtype=np.int64)
            for share in partition.cut(self.order(positions), self.batch_size):
                if partition_at is not None and partition_at(number) is not partition:
                    break  # cut otherwise from here on
                yield share
                number += 1


def shares_of_batches(
    partition_at: Callable[[int], Partition], batches: Iterable[Sequence[int]], first_batch: int = 0
) -> Iterator[Share]:
    """This worker's share of each global batch that a sampler of the person's made.

    Args:
        partition_at: How the batch of a number is cut, asked just before its share is given.
        batches: Sample ids of each global batch; lengths may differ.
        first_batch: Number of the first one.
    """
    number = first_batch
    for batch in batches:
        ids = np.asarray(batch, dtype=np.int64)
        if len(ids):
            yield from partition_at(number).cut(ids, len(ids))
            number += 1
