"""Sums over workers inside a step of TensorFlow, through which gradients flow."""

from __future__ import annotations

import weakref
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import record

from hvdlm.adapters.keras_wire import KerasWire

__all__ = ["GraphTotals"]


class GraphTotals:
    """See :class:`hvdlm.adapters.keras_statistics.Totals`.

    Args:
        wire: Collectives.
        weight: What this worker's gradient counts in the sum; float64.
    """

    def __init__(self, wire: KerasWire, weight: tf.Variable) -> None:
        self._wire, self._weight = wire, weight
        self._calls: weakref.WeakKeyDictionary[Any, dict[str, int]] = weakref.WeakKeyDictionary()

    def weight(self) -> tf.Tensor:
        """See :class:`hvdlm.adapters.keras_statistics.Totals`."""
        return tf.convert_to_tensor(self._weight)

    def recording(self) -> bool:
        """See :class:`hvdlm.adapters.keras_statistics.Totals`."""
        return bool(record.could_possibly_record())

    def total(self, sums: tf.Tensor, stem: str) -> tf.Tensor:
        """See :class:`hvdlm.adapters.keras_statistics.Totals`."""
        name = self._name(stem)

        @tf.custom_gradient  # type: ignore[untyped-decorator]  # TensorFlow has no types
        def summed(own: tf.Tensor) -> Any:
            weight = self.weight()
            counts = tf.cast(weight > 0, tf.float64)

            def gradient(upstream: tf.Tensor) -> tf.Tensor:
                # The reducer weighs this worker's gradients afterwards: what other workers' losses say is weighed
                # here, and divided by this worker's weight to meet that.
                weighed = tf.math.multiply_no_nan(upstream, weight)
                return tf.math.divide_no_nan(self._sum(weighed, f"{name}.backward"), weight)

            return self._sum(tf.math.multiply_no_nan(own, counts), name), gradient

        result: tf.Tensor = summed(sums)
        return result

    def _sum(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        return self._wire.timed(tensor, lambda: self._wire.sum(tensor, name))

    def _name(self, stem: str) -> str:
        """A name that no other sum of the same graph has: layers may be called several times in a step."""
        if tf.executing_eagerly():
            return f"hvdlm.total.{stem}"
        calls = self._calls.setdefault(tf.compat.v1.get_default_graph(), {})
        calls[stem] = calls.get(stem, 0) + 1
        return f"hvdlm.total.{stem}.{calls[stem]}"
