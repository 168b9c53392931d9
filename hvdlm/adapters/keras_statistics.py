"""What Keras computes over a batch inside the model or the loss, computed over the global batch.

Two things do not come out right from weighing each worker's gradient by its samples: the statistics of
BatchNormalization (Ioffe & Szegedy 2015, over the whole batch), and losses that are means over the targets that count
(masks, ``ignore_class``, ``reduction="mean_with_sample_weight"``), of which workers hold different numbers. Both need
one small sum over workers within the step; models without either of them pay nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import keras
from keras import ops
from keras.src.losses import loss as keras_loss

from hvdlm.adapters.keras_state import is_random_state, model_variables
from hvdlm.options import Options

__all__ = ["GlobalStatistics", "Totals", "batch_norms", "replicated"]

_MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")


class Totals(Protocol):
    """Sums over workers that gradients flow through, on Keras's backend."""

    def weight(self) -> Any:
        """What this worker's loss counts in the job: a float64 scalar, 0 for a filler."""
        ...

    def total(self, sums: Any, stem: str) -> Any:
        """The sum over workers of float64 ``sums``, fillers left out. Its gradient is that of the job's loss."""
        ...

    def recording(self) -> bool:
        """Whether gradients of what is computed now will be taken: evaluations are none of our business."""
        ...


def batch_norms(model: Any) -> list[Any]:
    """The BatchNormalization layers of a model."""
    return [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]


def replicated(models: Iterable[Any], local_norms: bool) -> list[Any]:
    """Variables that have to be equal on all ranks: all but random states and each worker's own moving statistics.

    Args:
        models: The models.
        local_norms: Whether moving statistics are each worker's own (``batch_norm="local"``).
    """
    models = list(models)
    norms = [norm for model in models for norm in batch_norms(model)] if local_norms else []
    local = {id(v) for norm in norms for v in norm.non_trainable_variables}
    variables = [v for model in models for v in model_variables(model)]
    return [v for v in variables if not is_random_state(v) and id(v) not in local]


class GlobalStatistics:
    """Makes the layers of some models and the losses of this process use the statistics of the global batch.

    Layers and losses stay as they are (and can be saved as they are): one method and one function of Keras are replaced
    until :meth:`remove`.

    Args:
        totals: Sums over workers.
        models: The models, asked for when a layer is met.
        options: With ``batch_norm="sync"`` BatchNormalization uses global statistics, with ``reduction="mean"`` means
            over targets are global ones.
    """

    def __init__(self, totals: Totals, models: Callable[[], Iterable[Any]], options: Options) -> None:
        self._totals, self._models = totals, models
        self._normalise, self._weigh = options.batch_norm == "sync", options.reduction == "mean"
        self._numbers: dict[int, int] = {}
        self._undo: list[Callable[[], None]] = []

    def install(self) -> None:
        """Start."""
        if self._undo:
            return
        if self._normalise:
            cls = keras.layers.BatchNormalization
            moments = cls._moments

            def global_moments(layer: Any, inputs: Any, mask: Any) -> Any:
                number = self._number(layer) if self._totals.recording() else None
                return moments(layer, inputs, mask) if number is None else self._moments(layer, inputs, mask, number)

            cls._moments = global_moments
            self._undo.append(lambda: setattr(cls, "_moments", moments))
        if self._weigh:
            reduce = keras_loss.reduce_weighted_values

            def global_mean(
                values: Any, sample_weight: Any = None, mask: Any = None, reduction: Any = _MEANS[0], dtype: Any = None
            ) -> Any:
                loss = reduce(values, sample_weight=sample_weight, mask=mask, reduction=reduction, dtype=dtype)
                if reduction not in _MEANS or not self._totals.recording():
                    return loss
                targets = _targets(sample_weight, mask, reduction)
                return loss if targets is None else self._reweigh(loss, targets)

            keras_loss.reduce_weighted_values = global_mean
            self._undo.append(lambda: setattr(keras_loss, "reduce_weighted_values", reduce))

    def remove(self) -> None:
        """Give Keras its own back."""
        for undo in self._undo:
            undo()
        self._undo.clear()

    def _number(self, layer: Any) -> int | None:
        """A number for a layer of one of the models, the same on all ranks; None for others."""
        if id(layer) not in self._numbers:
            known = (norm for model in self._models() for norm in batch_norms(model))
            self._numbers = {id(norm): i for i, norm in enumerate({id(n): n for n in known}.values())}
        return self._numbers.get(id(layer))

    def _moments(self, layer: Any, inputs: Any, mask: Any, number: int) -> Any:
        """Mean and variance of shape (channels,), over the elements of all workers that no mask leaves out."""
        axes = layer._reduction_axes
        wide = ops.cast(inputs, "float64")  # sums of squares cancel in single precision
        kept = ops.ones_like(wide)
        if mask is not None:
            kept = ops.cast(ops.broadcast_to(ops.expand_dims(ops.cast(mask, "bool"), -1), ops.shape(wide)), "float64")
            wide = ops.where(ops.cast(kept, "bool"), wide, ops.zeros_like(wide))
        parts = [ops.sum(wide, axes), ops.sum(wide * wide, axes), ops.sum(kept, axes)]
        total = self._totals.total(ops.stack(parts), f"norm.{number}")
        # Where a mask left nothing Keras has zeros, too.
        count = ops.maximum(total[2], 1.0)
        mean = total[0] / count
        variance = ops.maximum(total[1] / count - mean * mean, 0.0)
        return ops.cast(mean, inputs.dtype), ops.cast(variance, inputs.dtype)

    def _reweigh(self, loss: Any, targets: Any) -> Any:
        """The loss, so that the sum over workers of weight times loss is the mean over the targets of all of them.

        This worker's loss is its sum over its own targets; the reducer weighs by samples afterwards.
        """
        own = ops.stop_gradient(ops.cast(targets, "float64"))
        everywhere = ops.stop_gradient(self._totals.total(ops.reshape(own, (1,)), "targets"))[0]
        factor = ops.divide_no_nan(own, everywhere * self._totals.weight())
        return loss * ops.cast(factor, loss.dtype)


def _targets(sample_weight: Any, mask: Any, reduction: str) -> Any:
    """What Keras divides a sum of losses by, if that is not the number of samples."""
    if reduction == "mean_with_sample_weight":
        weights = keras_loss.apply_mask(
            None if sample_weight is None else ops.convert_to_tensor(sample_weight, "float32"),
            None if mask is None else ops.convert_to_tensor(mask, "float32"),
            dtype="float32",
            reduction=reduction,
        )
        return None if weights is None else ops.sum(weights)
    return None if mask is None else ops.sum(ops.cast(mask, "float32"))
