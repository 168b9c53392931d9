"""Samples that come one after the other, without numbers or a known end: generators, sockets, ``IterableDataset``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar, cast

import numpy as np

from hvdlm.errors import ConfigError, DataError
from hvdlm.plan import Partition, Share

__all__ = ["Stream"]

T = TypeVar("T")


class Stream(Generic[T]):
    """Cuts a stream that every worker reads, so that each sample is computed by one of them.

    The order is the stream's own: sample p belongs to global batch ``p // batch_size`` whatever the number of workers.
    Every worker reads the whole stream and keeps its part of each batch; no more than one batch is in memory. To go on
    where a run stopped, the samples before are read again and thrown away.

    >>> pass_on = Stream(lambda: iter("abcdefg"))
    >>> second = Partition(strategy="contiguous", rank=1, size=2, seed=0)
    >>> [samples for share, samples in pass_on.batches(second, batch_size=4)]
    [['c', 'd'], ['g']]

    Args:
        source: A function that gives a new iterator for each epoch, or an iterable that can be gone through again.
            Every worker has to get the same samples in the same order from it.
    """

    def __init__(self, source: Callable[[], Iterable[T]] | Iterable[T]) -> None:
        if not callable(source) and not hasattr(source, "__iter__"):
            raise DataError(
                f"a stream cannot be made of a {type(source).__name__}.",
                hint="pass an iterable, or a function that gives an iterator",
            )
        self._source = source
        self._used = False

    def __iter__(self) -> Iterator[T]:
        """Each sample of an epoch, from the start.

        Raises:
            DataError: The stream is an iterator that was used up.
        """
        return self._begin()

    def batches(
        self, partition: Partition, batch_size: int, *, start: int = 0, drop_last: bool = False
    ) -> Iterator[tuple[Share, list[T]]]:
        """This worker's share of each global batch, and its samples.

        The ids of a share are the numbers of its samples in the stream. A worker that has nothing of a batch gets its
        first sample as a filler, with a count of 0.

        Args:
            partition: How batches are cut.
            batch_size: Samples per global batch.
            start: Samples that were trained on before, by all workers together. The batch size may have been another.
            drop_last: Whether a short last batch is left out.

        Raises:
            ConfigError: ``batch_size`` or ``start`` is out of range.
            DataError: The stream is empty, ends before ``start``, or is an iterator that was used up.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; allowed: 1 or more.")
        if start < 0:
            raise ConfigError(f"start is {start}; allowed: 0 or more.")
        samples = self._begin()
        skipped = sum(1 for _ in itertools.islice(samples, start))
        if skipped < start:
            raise DataError(
                f"the stream ended after {skipped} samples, and {start} of it were trained on before.",
                hint="resume with the data that the run was started with",
            )
        first = start
        while batch := list(itertools.islice(samples, batch_size)):
            if len(batch) < batch_size and drop_last:
                return
            ids = np.arange(first, first + len(batch), dtype=np.int64)
            for share in partition.cut(ids, batch_size):
                yield share, [batch[number - first] for number in share.ids.tolist()]
            first += len(batch)
        if first == 0:
            raise DataError("the stream is empty.", hint="check what the samples are made from")

    def _begin(self) -> Iterator[T]:
        iterator = iter(self._source()) if callable(self._source) else iter(self._source)
        if iterator is cast(object, self._source):
            if self._used:
                raise DataError(
                    "the stream is an iterator and can be gone through only once.",
                    hint="pass the function that makes it: Stream(make_samples), not Stream(make_samples())",
                )
            self._used = True
        return iterator
