"""What was made of samples, by their numbers: the cache of a ``tf.data`` pipeline, for one worker's samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

__all__ = ["Memo"]


class Memo:
    """Keeps values in memory. Its methods add operations to the function of a ``map``.

    Args:
        specs: Types of the values of a sample.
    """

    def __init__(self, specs: Sequence[Any]) -> None:
        self._specs = specs
        self._kept: dict[int, list[npt.NDArray[Any]]] = {}

    @property
    def can_keep(self) -> bool:
        """Whether values can be kept in Python: ragged and sparse ones cannot."""
        return all(spec.dtype != tf.variant for spec in self._specs)

    @property
    def is_fixed(self) -> bool:
        """Whether the values of all samples have one shape."""
        return all(spec.shape.is_fully_defined() for spec in self._specs)

    @property
    def looked_up(self) -> list[tf.TypeSpec]:
        """Types of what :meth:`look` gives."""
        return [tf.TensorSpec([None], tf.int64), *(tf.TensorSpec(None, spec.dtype) for spec in self._specs)]

    def look(self, numbers: npt.NDArray[np.int64]) -> list[npt.NDArray[Any]]:
        """In Python: places of a batch whose samples are not kept, and the values of all of them if there are none."""
        missing = np.array([i for i, n in enumerate(numbers.tolist()) if n not in self._kept], dtype=np.int64)
        if not len(missing):
            return [missing, *self._values(numbers)]
        return [missing, *(np.zeros(0, object if t == tf.string else t.as_numpy_dtype) for t in self._types)]

    def stacked(self, numbers: Any, found: Sequence[Any], make: Callable[[Any], list[tf.Tensor]]) -> list[tf.Tensor]:
        """The values of all samples of a batch, one after the other along a new first axis.

        Args:
            numbers: int64, shape (n,), n static.
            found: What :meth:`look` gave.
            make: From a place in the batch to values; called for samples that are not kept yet.
        """
        places, *known = found

        def remember(i: Any) -> Any:
            number, new = numbers[places[i]], make(places[i])
            with tf.control_dependencies([tf.numpy_function(self._keep, [number, *new], tf.int64)]):
                return i + 1

        # As a call that is not inlined: where nothing is missing all its operations would be gone through for nothing.
        kept_apart = {"_noinline": True}

        @tf.function(autograph=False, experimental_attributes=kept_apart)  # type: ignore[untyped-decorator]  # untyped
        def all_of_them() -> list[tf.Tensor]:
            done = tf.while_loop(lambda i: i < tf.size(places), lambda i: (remember(i),), (tf.constant(0),))
            with tf.control_dependencies(done):
                return list(tf.numpy_function(self._values, [numbers], self._types))

        values: list[tf.Tensor] = tf.cond(tf.size(places) > 0, all_of_them, lambda: known)
        count = numbers.shape[0]
        return [tf.ensure_shape(v, [count, *s.shape]) for v, s in zip(values, self._specs, strict=True)]

    @property
    def _types(self) -> list[tf.DType]:
        return [spec.dtype for spec in self._specs]

    def _values(self, numbers: Any) -> list[npt.NDArray[Any]]:
        kept = [self._kept[number] for number in numbers.tolist()]
        return [np.stack(column) for column in zip(*kept, strict=True)]

    def one(self, number: Any, make: Callable[[], list[tf.Tensor]]) -> list[tf.Tensor]:
        """The values of one sample.

        Args:
            number: int64, shape ().
            make: Called if they are not kept yet.
        """

        def is_kept(number: Any) -> Any:
            return np.bool_(int(number) in self._kept)

        def values(number: Any) -> list[npt.NDArray[Any]]:
            return self._kept[int(number)]

        def take() -> list[tf.Tensor]:
            found = tf.numpy_function(values, [number], [spec.dtype for spec in self._specs])
            return [tf.ensure_shape(value, spec.shape) for value, spec in zip(found, self._specs, strict=True)]

        def remember() -> list[tf.Tensor]:
            new = make()
            with tf.control_dependencies([tf.numpy_function(self._keep, [number, *new], tf.int64)]):
                return [tf.identity(value) for value in new]

        result: list[tf.Tensor] = tf.cond(tf.numpy_function(is_kept, [number], tf.bool), take, remember)
        return result

    def _keep(self, number: Any, *values: Any) -> Any:
        self._kept[int(number)] = [np.array(value) for value in values]
        return np.int64(0)
