"""What ``fit`` and loops of one's own read: this worker's part of each global batch, and what that part counts.

A feed is a ``tf.data.Dataset`` whose elements carry, beside the person's data, how many of the samples count and how
many the global batch has. So the weight of a gradient travels with its batch through prefetching and through several
steps in one call.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import tensorflow as tf
from keras.src import tree
from keras.src.trainers.data_adapters import array_slicing
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter

from hvdlm.adapters.keras_passes import Passes, Planned, claiming
from hvdlm.adapters.keras_shares import Shares
from hvdlm.algorithms.ledger import Cursor, Source, digest_of
from hvdlm.plan import Epoch, Share

__all__ = ["COUNTS", "DATA", "ArrayFeed", "BatchFeed", "Feed"]

DATA, COUNTS = "hvdlm.data", "hvdlm.counts"
"""Keys of a feed's elements: the person's data, and int64 [samples that count, samples of the global batch]."""

_BLOCK = 64
_FEW = 2
"""What is planned ahead where shares follow the speed of workers, so that they follow soon."""
_COUNTS = tf.TensorSpec([2], tf.int64)


class Feed(Protocol):
    """A source of training batches."""

    dataset: tf.data.Dataset
    steps: int | None
    """Global batches in a pass; None if not known."""

    def start(self, number: int) -> None:
        """The next iterator over :attr:`dataset` reads pass ``number``."""
        ...

    def take(self, steps: int, count: int, total: int) -> list[Planned]:
        """What the last ``steps`` batches were; ``count`` and ``total`` are their samples here and in the job."""
        ...

    def resume(self, done: Cursor, stream: tuple[int, int] | None) -> None:
        """The first iterator reads the rest of a pass; called before it is made.

        Args:
            done: The pass, and what is done of it.
            stream: (epochs that are done, ``steps_per_epoch``) where that cuts epochs from a stream.
        """
        ...

    def describe(self) -> tuple[int, int]:
        """(samples in the data, samples that a pass trains on); zeros if not known."""
        ...

    def example(self) -> Any:
        """A batch to build a model from; reading it takes nothing from the passes."""
        ...


class ArrayFeed(Passes):
    """Arrays in memory, shared out by sample id.

    Args:
        x, y, sample_weight, class_weight, batch_size, shuffle, steps: As for ``fit``.
        shares: How batches are cut.
        endless: Whether one iterator reads pass after pass (``steps_per_epoch``).
    """

    def __init__(
        self,
        x: Any,
        y: Any,
        sample_weight: Any,
        class_weight: Any,
        *,
        batch_size: int | None,
        shuffle: bool,
        steps: int | None,
        shares: Shares,
        per_worker: bool,
        endless: bool,
    ) -> None:
        super().__init__(endless)
        arrays = ArrayDataAdapter(
            x, y, sample_weight=sample_weight, class_weight=class_weight, batch_size=batch_size, steps=steps
        )
        self._shares, self._at, self._shuffle = shares, shares.follow(), shuffle
        self._seed = shares.now.seed
        self.num_samples = int(arrays._num_samples)
        self.batch_size = int(arrays._batch_size) * (shares.now.size if per_worker else 1)
        sliceable = array_slicing.convert_to_sliceable(arrays._inputs, target_backend="tensorflow")
        inputs = tree.map_structure(_as_tensor, tree.lists_to_tuples(sliceable))
        self.steps: int | None = len(self._epoch(0))
        signature = (
            tf.TensorSpec([None], tf.int64),
            tf.TensorSpec([None], tf.int64),
            tf.TensorSpec([None, 2], tf.int64),
        )
        blocks = tf.data.Dataset.from_generator(self._blocks, output_signature=signature)
        ids = blocks.flat_map(_rows)

        def rows(ids: Any) -> Any:
            def one(value: Any) -> Any:
                if isinstance(value, (list, tuple, dict)):
                    return None
                if isinstance(value, array_slicing.TensorflowSparseWrapper):
                    return array_slicing.slice_tensorflow_sparse_wrapper(value, ids)
                return tf.gather(value, ids) if tf.is_tensor(value) else value

            return tree.traverse(one, inputs)

        self._row = rows
        self.example = lambda: rows(tf.range(1))
        ahead = _FEW if shares.dynamic else tf.data.AUTOTUNE

        def made(length: int | None) -> tf.data.Dataset:
            def element(ids: Any, counts: Any) -> Any:
                return {DATA: rows(tf.ensure_shape(ids, [length])), COUNTS: counts}

            return ids.map(element, num_parallel_calls=ahead).prefetch(2)

        self._made = made
        cardinality = tf.data.INFINITE_CARDINALITY if endless else self.steps
        self.dataset = made(self._length(Cursor())).apply(tf.data.experimental.assert_cardinality(cardinality))

    def _length(self, done: Cursor) -> int | None:
        """Samples of every part, where all have as many: TensorFlow makes a faster step of it, as in plain Keras."""
        partition, rest = self._shares.now, (self.num_samples - done.samples) % self.batch_size
        if self._shares.dynamic or rest or self.num_samples % self.batch_size:
            return None
        own = self.batch_size if partition.strategy == "none" else partition.counts(self.batch_size)[partition.rank]
        return max(1, int(own))

    def resume(self, done: Cursor, stream: tuple[int, int] | None) -> None:
        """See :class:`Feed`."""
        super().resume(done, stream)
        self.dataset = claiming(self._made(self._length(done)), self.dataset)

    def _epoch(self, number: int, done: Cursor = Cursor()) -> Epoch:  # noqa: B008 (it is frozen)
        return Epoch(
            partition=self._shares.now,
            num_samples=self.num_samples,
            batch_size=self.batch_size,
            shuffle=self._shuffle,
            drop_last=False,
            number=number,
            batches_done=done.batch,
            samples_done=done.samples,
        )

    def _blocks(self) -> Iterator[tuple[Any, Any, Any]]:
        for number in self.numbers():
            done = self.done_of(number)
            epoch = self._epoch(number, done)
            steps = len(epoch)
            shares = epoch.shares(partition_at=functools.partial(self._at, number))
            for start, block in _grouped(shares, done.batch, _FEW if self._shares.dynamic else _BLOCK):
                for i, share in enumerate(block, start):
                    self.note(Planned(share, number, i == done.batch, i == steps - 1))
                yield (
                    np.concatenate([share.ids for share in block]),
                    np.array([len(share.ids) for share in block], dtype=np.int64),
                    np.array([(share.count, share.total) for share in block], dtype=np.int64),
                )

    def describe(self) -> tuple[int, int]:
        """See :class:`Feed`."""
        return self.num_samples, self.num_samples

    def source(self) -> Source:
        """What makes a position mean the same samples."""
        few = sorted({0, self.num_samples // 2, self.num_samples - 1})
        parts = tf.nest.flatten(self._row(tf.constant(few)), expand_composites=True)
        dense = [v for v in parts if tf.is_tensor(v)]
        return Source(
            dataset="arrays",
            num_samples=self.num_samples,
            content=digest_of([np.ascontiguousarray(v.numpy()).tobytes() for v in dense if v.dtype != tf.string]),
            seed=self._seed,
            shuffled=self._shuffle,
        )


def _as_tensor(value: Any) -> Any:
    return (
        value
        if value is None or isinstance(value, array_slicing.TensorflowSparseWrapper)
        else tf.convert_to_tensor(value)
    )


def _grouped(shares: Iterator[Share], start: int, most: int) -> Iterator[tuple[int, list[Share]]]:
    # Few at first: the first step must not wait for a whole block.
    size = min(4, most)
    while block := list(itertools.islice(shares, size)):
        yield start, block
        start += len(block)
        size = most


def _rows(ids: tf.Tensor, lengths: tf.Tensor, counts: tf.Tensor) -> tf.data.Dataset:
    slices = tf.data.Dataset.from_tensor_slices((tf.cumsum(lengths, exclusive=True), lengths, counts))
    return slices.map(lambda start, length, count: (ids[start : start + length], count))


class BatchFeed(Passes):
    """Whole global batches that Python makes (``keras.utils.PyDataset``, generators), cut by position on every worker.

    Args:
        read: Global batches of pass ``number``, each a tensor, tuple or dict with samples along the first axis.
        first: A batch to learn types and shapes from.
        steps: Batches in a pass, None if not known.
        shares: How batches are cut.
        endless: Whether one iterator reads pass after pass.
    """

    def __init__(
        self,
        read: Callable[[int], Iterable[Any]],
        first: Any,
        *,
        steps: int | None,
        shares: Shares,
        endless: bool,
    ) -> None:
        super().__init__(endless)
        self._read, self._at = read, shares.follow()
        self.steps = steps
        arrays = tree.map_structure(_as_array, tree.lists_to_tuples(first))
        self.example = lambda: tree.map_structure(tf.convert_to_tensor, arrays)
        spec = tree.map_structure(_spec, arrays)
        dataset = tf.data.Dataset.from_generator(self._batches, output_signature={DATA: spec, COUNTS: _COUNTS})
        self._unchecked = dataset.prefetch(2)
        if endless or steps is not None:
            cardinality = tf.data.INFINITE_CARDINALITY if endless else steps
            dataset = dataset.apply(tf.data.experimental.assert_cardinality(cardinality))
        self.dataset = dataset.prefetch(2)

    def resume(self, done: Cursor, stream: tuple[int, int] | None) -> None:
        """See :class:`Feed`. Batches that are done are read again, and dropped."""
        if stream is not None and self.steps is None:  # a generator is one pass without end
            done = Cursor(done.epoch, stream[0] * stream[1], done.samples)
        super().resume(done, stream)
        self.dataset = claiming(self._unchecked, self.dataset)

    def _batches(self) -> Iterator[Any]:
        for number in self.numbers():
            position = 0
            done = self.done_of(number)
            for i, batch in enumerate(self._read(number)):
                if i < done.batch:
                    position = done.samples
                    continue
                batch = tree.map_structure(_as_array, tree.lists_to_tuples(batch))
                samples = len(tree.flatten(batch)[0])
                ids = np.arange(position, position + samples, dtype=np.int64)
                (share,) = self._at(number, i).cut(ids, samples)
                self.note(Planned(share, number, i == done.batch, self.steps is not None and i == self.steps - 1))
                rows = share.ids - position
                counts = np.array([share.count, share.total], dtype=np.int64)
                yield {DATA: tree.map_structure(lambda a, rows=rows: a[rows], batch), COUNTS: counts}
                position += samples

    def describe(self) -> tuple[int, int]:
        """See :class:`Feed`."""
        return 0, 0


def _as_array(value: Any) -> Any:
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype == np.float64 else array  # as Keras does


def _spec(array: Any) -> tf.TensorSpec:
    return tf.TensorSpec([None, *array.shape[1:]], array.dtype)
