"""How long training waits for batches under TensorFlow, where Python does not see it: inside compiled steps."""

from __future__ import annotations

import tensorflow as tf

from hvdlm.adapters.keras_passes import claiming

__all__ = ["Reading"]

_ENDLESS = 1 << 62


class Reading:
    """Adds up the seconds that whoever iterates over datasets waits for their elements."""

    def __init__(self) -> None:
        with tf.init_scope(), tf.device("CPU:0"):
            self._waited = tf.Variable(0.0, dtype=tf.float64, trainable=False, name="hvdlm_reading")
        self._told = 0.0

    def timed(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """The same elements, read ahead as far as the dataset itself does."""

        def note(began: tf.Tensor, element: object) -> object:
            with tf.control_dependencies(tf.nest.flatten(element, expand_composites=True)):
                self._waited.assign_add(tf.timestamp() - began)
            return element

        # A zip asks one after the other: first for the time, then for the element.
        clock = tf.data.Dataset.range(_ENDLESS).map(lambda _: tf.timestamp())
        options = tf.data.Options()
        options.experimental_optimization.inject_prefetch = False
        return claiming(tf.data.Dataset.zip((clock, dataset)).map(note).with_options(options), dataset)

    def new(self) -> float:
        """Seconds since the last call."""
        before, self._told = self._told, float(self._waited.numpy())
        return self._told - before
