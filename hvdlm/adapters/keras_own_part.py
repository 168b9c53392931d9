"""A ``tf.data`` pipeline of which each worker makes its own samples only.

The steps that order are replayed on sample numbers; each batch of numbers is cut like any global batch (by hash of the
number, so that a sample comes back to the worker that has it in its cache); what the person's functions make of a
sample is made by the worker that trains on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from tensorflow.python.data.util import nest, structure

from hvdlm.adapters.keras_data import COUNTS, DATA
from hvdlm.adapters.keras_memo import Memo
from hvdlm.adapters.keras_recipe import Recipe
from hvdlm.plan import Partition, Share

__all__ = ["OwnPart"]

Note = Callable[[int, Share], None]


class OwnPart:
    """See :class:`hvdlm.adapters.keras_pipeline.Way`.

    Args:
        recipe: The person's pipeline.
        partition: How batches are cut.
        batch_size: Samples of a full global batch.
    """

    def __init__(self, recipe: Recipe, partition: Partition, batch_size: int) -> None:
        self._recipe, self._partition, self._batch_size = recipe, partition, batch_size
        self._tensors = recipe.tensors
        self._raw = [] if self._tensors else structure.get_flat_tensor_specs(recipe.source.element_spec)
        # A short batch may give a worker one more than a full one, where weights are unequal.
        sizes = range(1, batch_size + 1) if partition.weights else (batch_size,)
        self._width = max(1, *(int(partition.counts(n)[partition.rank]) for n in sizes))
        functions, self._num_kept = recipe.functions, recipe.cached_after
        memo = Memo(functions[self._num_kept - 1].structured_outputs) if self._num_kept else None
        self._memo = memo if memo is not None and memo.can_keep else None
        # Values of one shape, or those that go into a batch as they are, are kept by batches; others one by one.
        self._by_batch = self._memo is not None and (self._memo.is_fixed or self._num_kept == len(functions))
        self._always_full = recipe.drop_remainder and self._width == partition.counts(batch_size)[partition.rank]

    @property
    def described(self) -> tuple[int, int]:
        """(samples in the data, samples that a pass trains on); zeros if not known."""
        if not self._tensors or not self._recipe.is_permutation:
            return 0, 0
        samples = self._recipe.num_samples or 0
        return samples, samples - (samples % self._batch_size if self._recipe.drop_remainder else 0)

    def ordered(self) -> tf.data.Dataset:
        """Global batches of sample numbers, with the samples of a source that has to be read one after the other."""
        if self._tensors:
            return self._recipe.replayed(tf.data.Dataset.range(self._recipe.num_samples), self._batch_size)

        def packed(number: Any, *element: Any) -> Any:
            element = element if len(element) > 1 else element[0]
            flat = structure.to_tensor_list(self._recipe.source.element_spec, element)
            # Batches are made of what has one shape; the person's are made of what comes out of the functions.
            return (number, *(t if _is_fixed(spec) else tf.io.serialize_tensor(t) for t, spec in self._each(flat)))

        return self._recipe.replayed(self._recipe.source.enumerate().map(packed), self._batch_size)

    def _each(self, flat: Sequence[Any]) -> list[tuple[Any, Any]]:
        return list(zip(flat, self._raw, strict=True))

    def plan(self, batches: tf.data.Dataset, note: Note) -> tf.data.Dataset:
        """This worker's part of each batch of numbers, and what it counts; parts are filled up to one width.

        With them what is kept of the samples: all that Python has to do for a batch is done in one call.
        """
        looked_up = self._memo.looked_up if self._memo is not None and self._by_batch else []
        specs = [tf.TensorSpec([self._width], tf.int64), tf.TensorSpec([2], tf.int64), *looked_up]

        def place(number: Any, ids: Any) -> list[npt.NDArray[Any]]:
            rows, share = self._partition.part_of(ids)
            note(int(number), share)
            rows = np.resize(rows, self._width)
            known = self._memo.look(ids[rows]) if self._memo is not None and self._by_batch else []
            return [rows, np.array([share.count, share.total], dtype=np.int64), *known]

        def cut(number: Any, batch: Any) -> Any:
            parts = batch if isinstance(batch, tuple) else (batch,)
            found = tf.numpy_function(place, [number, parts[0]], [spec.dtype for spec in specs])
            rows, counts, *known = (tf.ensure_shape(f, spec.shape) for f, spec in zip(found, specs, strict=True))
            return tuple(tf.gather(part, rows) for part in parts), counts, tuple(known)

        return batches.enumerate().map(cut)

    def make(self, planned: tf.data.Dataset) -> tf.data.Dataset:
        """The elements of a feed."""
        functions, kept, memo = self._recipe.functions, self._num_kept, self._memo
        plain = planned if self._by_batch else planned.map(lambda parts, counts, _: (parts, counts))
        if memo is None:
            if not functions and all(_is_fixed(spec) for spec in self._raw):
                return self._rows(plain, self._raw_rows)
            return self._one_by_one(plain, lambda parts: _through(functions, self._raw_sample(parts)))
        if not self._by_batch:

            def sample(parts: Any) -> list[tf.Tensor]:
                return memo.one(parts[0], lambda: _through(functions[:kept], self._raw_sample(parts)))

            return self._one_by_one(plain, lambda parts: _through(functions[kept:], sample(parts)))

        def remembered(parts: Any, counts: Any, found: Any) -> Any:
            def make(row: Any) -> list[tf.Tensor]:
                return _through(functions[:kept], self._raw_sample([part[row] for part in parts]))

            return tuple(memo.stacked(parts[0], found, make)), counts

        known = planned.map(remembered, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        if kept == len(functions):
            return self._rows(known, list)
        return self._one_by_one(known, lambda values: _through(functions[kept:], values))

    def _rows(self, planned: tf.data.Dataset, rows: Callable[[Any], list[tf.Tensor]]) -> tf.data.Dataset:
        """All samples of a batch at once."""

        def element(parts: Any, counts: Any) -> Any:
            return self._element(nest.pack_sequence_as(self._recipe.sample_spec, rows(parts)), counts)

        return planned.map(element, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

    def _one_by_one(self, planned: tf.data.Dataset, sample: Callable[[Any], list[tf.Tensor]]) -> tf.data.Dataset:
        """Each sample by itself, and batches of them."""

        def one(parts: Any, counts: Any) -> Any:
            return structure.from_compatible_tensor_list(self._recipe.sample_spec, sample(parts)), counts

        singles = planned.map(lambda parts, counts: (parts, tf.tile(counts[None], [self._width, 1]))).unbatch()
        made = singles.map(one, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        batches = made.batch(self._width, drop_remainder=True)
        return batches.map(lambda batch, counts: self._element(batch, counts[0]))

    def _raw_rows(self, parts: Any) -> list[tf.Tensor]:
        return [tf.gather(t, parts[0]) for t in self._tensors] if self._tensors else list(parts[1:])

    def _raw_sample(self, parts: Any) -> list[tf.Tensor]:
        if self._tensors:
            return [t[parts[0]] for t in self._tensors]
        return [
            p if _is_fixed(spec) else tf.ensure_shape(tf.io.parse_tensor(p, spec.dtype), spec.shape)
            for p, spec in self._each(parts[1:])
        ]

    def _element(self, batch: Any, counts: Any) -> Any:
        if not self._always_full:
            rows = tf.maximum(counts[0], 1)  # an empty part is one sample that counts nothing, to keep in step
            batch = nest.map_structure(lambda value: _first(value, rows), batch)
        data = batch[0] if isinstance(batch, tuple) and len(batch) == 1 else batch
        return {DATA: data, COUNTS: counts}


def _through(functions: Sequence[Any], flat: list[tf.Tensor]) -> list[tf.Tensor]:
    for function in functions:
        flat = function(*flat)
    return flat


def _is_fixed(spec: Any) -> bool:
    return bool(spec.shape.is_fully_defined())


def _first(value: Any, rows: Any) -> Any:
    if isinstance(value, tf.SparseTensor):
        return tf.sparse.slice(value, tf.zeros_like(value.dense_shape), tf.concat([[rows], value.dense_shape[1:]], 0))
    return value[:rows]
