"""A ``tf.data`` pipeline whose batches are cut after they are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from keras.src import tree

from hvdlm.adapters.keras_data import COUNTS, DATA
from hvdlm.adapters.keras_shares import Shares
from hvdlm.plan import Partition, Share

__all__ = ["WholeBatches"]


class WholeBatches:
    """See :class:`hvdlm.adapters.keras_pipeline.Way`. Every worker makes all of each batch, and takes its part of it.

    Args:
        dataset: Of global batches.
        shares: How they are cut.
        per_worker: Whether the dataset's batches are those of each worker.
    """

    described = (0, 0)

    def __init__(self, dataset: tf.data.Dataset, shares: Shares, per_worker: bool) -> None:
        self._dataset, self._shares, self._partition = dataset, shares, shares.now
        partition = shares.now
        self._per_worker = per_worker and partition.size > 1 and partition.strategy != "none"

    def ordered(self) -> tf.data.Dataset:
        """See :class:`hvdlm.adapters.keras_pipeline.Way`."""
        return self._dataset

    def plan(self, batches: tf.data.Dataset, note: Callable[[int, Share], None]) -> tf.data.Dataset:
        """See :class:`hvdlm.adapters.keras_pipeline.Way`."""
        if not self._per_worker:
            return batches
        samples = int(tree.flatten(next(iter(batches)))[0].shape[0])
        length = int(batches.cardinality())
        larger = batches.rebatch(samples * self._partition.size)
        if length > 0:
            larger = larger.apply(tf.data.experimental.assert_cardinality(-(-length // self._partition.size)))
        return larger

    def make(self, planned: tf.data.Dataset) -> tf.data.Dataset:
        """See :class:`hvdlm.adapters.keras_pipeline.Way`."""
        return _follow(planned, self._shares) if self._shares.dynamic else _cut(planned, self._partition)


def _cut(dataset: tf.data.Dataset, partition: Partition) -> tf.data.Dataset:
    """Elements of a feed from global batches: samples [start, start + count) of each batch, as contiguous shares."""
    rank, size = partition.rank, partition.size

    def weighted(samples: Any) -> Any:
        counts = partition.counts(int(samples))
        return np.array([counts[:rank].sum() if counts[rank] else 0, counts[rank]], dtype=np.int64)

    def cut(*element: Any) -> Any:
        data = element if len(element) > 1 else element[0]
        samples = tf.shape(tree.flatten(data)[0], tf.int64)[0]
        if size == 1:
            return {DATA: data, COUNTS: tf.stack([samples, samples])}
        if partition.strategy == "none":
            return {DATA: data, COUNTS: tf.stack([samples, samples * size])}
        if partition.weights:
            bounds = tf.ensure_shape(tf.numpy_function(weighted, [samples], tf.int64), [2])
            start, count = bounds[0], bounds[1]
        else:
            base, extra = samples // size, samples % size
            count = base + tf.cast(rank < extra, tf.int64)
            start = tf.where(count > 0, rank * base + tf.minimum(tf.constant(rank, tf.int64), extra), 0)
        return _part(data, start, count, samples)

    return dataset.map(cut, num_parallel_calls=tf.data.AUTOTUNE)


def _part(data: Any, start: Any, count: Any, samples: Any) -> dict[str, Any]:
    end = start + tf.maximum(count, 1)  # an empty share takes one sample that counts nothing, to keep in step
    return {DATA: tree.map_structure(lambda t: t[start:end], data), COUNTS: tf.stack([count, samples])}


def _follow(dataset: tf.data.Dataset, shares: Shares) -> tf.data.Dataset:
    """The same, by shares that follow the speed of workers: each batch's are asked for when it is planned."""
    rank, at = shares.now.rank, shares.follow()
    passes = 0

    def bounds(number: Any, samples: Any) -> Any:
        nonlocal passes
        passes += int(number) == 0  # batches are planned one after the other, and each iterator begins at the first
        counts = at(passes, int(number)).counts(int(samples))
        return np.array([counts[:rank].sum() if counts[rank] else 0, counts[rank], samples], dtype=np.int64)

    def plan(number: Any, data: Any) -> Any:
        samples = tf.shape(tree.flatten(data)[0], tf.int64)[0]
        return tf.ensure_shape(tf.numpy_function(bounds, [number, samples], tf.int64), [3]), data

    # Little is read ahead, so that shares follow soon.
    return dataset.enumerate().map(plan).map(lambda b, data: _part(data, b[0], b[1], b[2]), num_parallel_calls=2)
