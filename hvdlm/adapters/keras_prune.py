"""Gradual magnitude pruning of Keras models: masks that rise with a schedule, and are equal on all ranks.

All of it happens behind the outermost ``apply`` of an optimizer, inside compiled steps too; masks are made by NumPy,
called from the graph at the steps where they are due.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdlm.adapters.keras_reducer import tensor_of
from hvdlm.algorithms.pruning import sparsity_at
from hvdlm.options import Options
from hvdlm.pruning import Candidate, final_sparsity, masks_of, prunable

__all__ = ["Pruner"]


class Pruner:
    """Makes masks by the schedule and keeps what they drop at zero, in weights and in gradients.

    Args:
        models: (where it was found, model), built.
        options: ``prune_*``, ``sync``.
    """

    def __init__(self, models: Sequence[tuple[str, Any]], options: Options) -> None:
        self._options = options
        found = prunable(
            (
                Candidate(where, v.path, v, len(v.shape) > 1 and "float" in v.dtype and id(v) not in embedded)
                for where, model in models
                for embedded in [_embedded(model)]
                for v in model.trainable_variables
            ),
            options.prune_exclude,
        )
        self._weights = [tensor_of(v) for _, v in found]
        self.optimizer: Any = None
        """The optimizer whose steps are counted."""
        with tf.init_scope():  # variables outlive the graph that is being traced
            self._masks = [tf.Variable(tf.ones(w.shape, tf.bool), trainable=False) for w in self._weights]
            self._steps = tf.Variable(0, dtype=tf.int64, trainable=False)
            self._due = tf.Variable(-1, dtype=tf.int64, trainable=False)
        self.masks = {id(w): mask for w, mask in zip(self._weights, self._masks, strict=True)}
        """By ``id`` of the ``tf.Variable``: True for what is kept."""

    def masked(self, grads: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """What is pruned gets no gradient, so that optimizers forget it."""
        result = list(grads)
        for i, v in enumerate(variables):
            mask = self.masks.get(id(tensor_of(v)))
            if mask is not None and grads[i] is not None:
                grad = tf.convert_to_tensor(grads[i])
                result[i] = tf.where(mask, grad, tf.zeros_like(grad))
        return result

    def applied(self, optimizer: Any) -> None:
        """An optimizer has made its step. Also in graphs."""
        self.apply()
        self.optimizer = self.optimizer or optimizer
        if optimizer is not self.optimizer:
            return
        cycle = int(getattr(optimizer, "gradient_accumulation_steps", None) or 1)
        step, rest = self._steps.assign_add(1) // cycle, self._steps % cycle
        begin, end, every = self._options.prune_begin, self._options.prune_end, self._options.prune_every
        inside = tf.logical_and(step >= begin, step <= end)
        on_time = tf.logical_or((step - begin) % every == 0, step == end)
        is_due = tf.reduce_all([rest == 0, inside, on_time])
        self._due.assign(tf.where(is_due, step, self._due))
        if self._options.sync == "global":
            self.synced()

    def synced(self) -> None:
        """Replicas are equal: make the masks that are due. Also in graphs."""

        def make() -> tf.Tensor:
            values = [tf.cast(w, tf.float64 if w.dtype == tf.float64 else tf.float32) for w in self._weights]
            made = tf.numpy_function(self._make, [self._due.read_value(), *values], [tf.bool] * len(values))
            for mask, new in zip(self._masks, made, strict=True):
                mask.assign(tf.ensure_shape(new, mask.shape))
            self._due.assign(-1)
            return tf.constant(True)

        tf.cond(self._due >= 0, make, lambda: tf.constant(False))
        self.apply()

    def _make(self, step: Any, *weights: Any) -> list[Any]:
        at = {name: getattr(self._options, f"prune_{name}") for name in ("begin", "end", "every")}
        target = sparsity_at(int(step), final=final_sparsity(self._options), **at)
        return masks_of(list(weights), target or 0.0, self._options)

    def apply(self) -> None:
        """An optimizer may have moved what is pruned: back to zero. Also in graphs."""
        for w, mask in zip(self._weights, self._masks, strict=True):
            w.assign(tf.where(mask, w, tf.zeros_like(w)))

    def state(self) -> dict[str, Any]:
        """Masks, and where the schedule is."""
        masks = {str(i): mask.numpy().astype(np.uint8) for i, mask in enumerate(self._masks)}
        return {"steps": int(self._steps.numpy()), "masks": masks}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self._steps.assign(int(state["steps"]))
        self._due.assign(-1)
        for i, mask in enumerate(self._masks):
            mask.assign(np.asarray(state["masks"][str(i)]).reshape(mask.shape).astype(bool))
        self.apply()


def _embedded(model: Any) -> set[int]:
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.Embedding)]
    return {id(v) for layer in layers for v in layer.variables}
