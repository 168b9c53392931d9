"""Makes gradients global before the outermost optimizer clips and applies them.

Keras 3 leads every way of training through ``apply`` of the optimizer: ``fit``, ``train_on_batch``, ``apply_gradients``
in loops of one's own and overridden ``train_step`` methods. While hvdlm is attached that method is watched on Keras's
own classes; the person's optimizer object stays as it is, so that saved models load anywhere.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.optimizers.base_optimizer import BaseOptimizer

from hvdlm.adapters.keras_planner import buckets_for
from hvdlm.adapters.keras_wire import KerasWire
from hvdlm.contracts import Collectives
from hvdlm.options import Options

__all__ = ["ApplyWatch", "Reducer", "tensor_of"]

_DENSE_BYTES = 4 * 2**20
"""Gradients of embeddings up to this size travel dense without asking: no agreement is as cheap as that."""
_MAX_GATHERED_BYTES = 64 * 2**20
"""Rows that cannot be added up are gathered up to this size; above it memory counts for more than the last digit."""


def tensor_of(variable: Any) -> Any:
    """The ``tf.Variable`` in a ``keras.Variable``, or the variable itself."""
    return variable.value if isinstance(variable, keras.Variable) else variable


class ApplyWatch:
    """Gives each outermost ``optimizer.apply`` global gradients.

    Args:
        before: Called with optimizer, gradients and variables; returns what to apply, all of it or none.
        after: Called with optimizer and variables when that was applied.
    """

    def __init__(
        self,
        before: Callable[[Any, list[Any], list[Any] | None], list[Any]],
        after: Callable[[Any, list[Any] | None], None],
    ) -> None:
        self._before, self._after = before, after
        self._depth = 0
        self._originals: list[tuple[type, str, Any]] = []

    def install(self) -> None:
        """Start watching."""
        if self._originals:
            return
        # LossScaleOptimizer has an apply of its own, which looks for infinities before it calls the inner one: the
        # outermost call is the one to act on, or ranks would disagree on which steps to skip.
        loss_scaling = keras.optimizers.LossScaleOptimizer
        for cls in (BaseOptimizer, loss_scaling):
            self._set(cls, "apply", self._watched(cls.__dict__["apply"]))
        self._set(loss_scaling, "scale_loss", _weighted(loss_scaling.__dict__["scale_loss"]))

    def _set(self, cls: type, name: str, function: Callable[..., Any]) -> None:
        self._originals.append((cls, name, cls.__dict__[name]))
        setattr(cls, name, function)

    def _watched(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def apply(optimizer: Any, grads: Any, trainable_variables: Any = None) -> Any:
            if self._depth:
                return original(optimizer, grads, trainable_variables)
            self._depth += 1
            try:
                variables = None if trainable_variables is None else list(trainable_variables)
                grads = self._before(optimizer, list(grads), variables)
                result = original(optimizer, grads, variables)
                self._after(optimizer, variables)
                return result
            finally:
                self._depth -= 1

        return apply

    def remove(self) -> None:
        """Stop watching."""
        for cls, name, original in self._originals:
            setattr(cls, name, original)
        self._originals.clear()


_reducers: weakref.WeakValueDictionary[int, Reducer] = weakref.WeakValueDictionary()
"""id of an optimizer -> what sums its gradients."""


def _weighted(original: Callable[..., Any]) -> Callable[..., Any]:
    """Scale a loss that is weighted before: in float16 a mean over one worker's few samples overflows where the same
    samples' part of the mean over all does not.
    """

    @functools.wraps(original)
    def scale_loss(optimizer: Any, loss: Any) -> Any:
        reducer = _reducers.get(id(optimizer))
        return original(optimizer, loss if reducer is None else reducer.weighted(loss))

    return scale_loss


class Reducer:
    """Sums one optimizer's gradients over workers.

    Args:
        optimizer: The outermost optimizer: the one that ``apply`` is called on.
        wire: Collectives.
        weight: What this worker's gradient counts in the sum; a float64 variable that the data pipeline sets.
        options: How gradients travel.
        bucket_cap_bytes: Largest bucket.
        name: Tells this reducer's collectives from those of others.
        within_host, tell: See :class:`hvdlm.adapters.keras_planner.PlannedBuckets`.
        weighs_loss: Whether a scaled loss is weighted, and its gradients are not.
    """

    def __init__(
        self,
        optimizer: Any,
        *,
        wire: KerasWire,
        weight: tf.Variable,
        options: Options,
        bucket_cap_bytes: float,
        name: str,
        within_host: bool = False,
        tell: Callable[..., object] = lambda *_, **__: None,
        weighs_loss: bool = True,
    ) -> None:
        self.optimizer = optimizer
        if weighs_loss:
            _reducers[id(optimizer)] = self
        self._is_weighted = False
        self.masks: Mapping[int, tf.Variable] = {}
        """By ``id`` of the ``tf.Variable``: which of its elements are trained; all of them where there is no mask."""
        self._wire, self._weight = wire, weight
        self._name = f"hvdlm.grad.{name}"
        self._buckets = buckets_for(options, wire, self._name, bucket_cap_bytes, within_host, tell)

    def state(self) -> dict[str, Any]:
        """What the codec remembers between two steps."""
        return self._buckets.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self._buckets.load_state(state)

    def pool(self, collectives: Collectives) -> None:
        """See :meth:`hvdlm.adapters.keras_bucket.Buckets.pool`."""
        self._buckets.pool(collectives)

    def weighted(self, loss: Any) -> Any:
        """The loss times what this worker's gradient counts, which :meth:`reduce` then leaves alone."""
        self._is_weighted = True
        loss = tf.convert_to_tensor(loss)
        return tf.math.multiply_no_nan(loss, tf.cast(self._weight, loss.dtype))

    def reduce(self, grads: Sequence[Any], variables: Sequence[Any] | None) -> list[Any]:
        """The gradients of the global batch; None stays None."""
        result = list(grads)
        used = [i for i, grad in enumerate(grads) if grad is not None]
        if not used:
            return result
        owners = list(variables or self.optimizer._trainable_variables or ())
        for i in used:
            # Buckets need sizes while the graph is traced; TensorFlow has lost some of them (the bias of a masked GRU).
            if not isinstance(grads[i], tf.IndexedSlices) and grads[i].shape.num_elements() is None:
                result[i] = tf.ensure_shape(grads[i], owners[i].shape)
        grads = list(result)
        weight = tf.convert_to_tensor(self._weight)
        if self._is_weighted:
            self._is_weighted = False
            weight = tf.cast(weight > 0, weight.dtype)
        cycle = getattr(self.optimizer, "gradient_accumulation_steps", None)
        own = [grads[i] for i in used]
        if cycle:
            if not self.optimizer.built:
                with tf.init_scope():
                    self.optimizer.build(owners)
            own, trained = [tf.convert_to_tensor(grad) for grad in own], [owners[i] for i in used]
            found = self._wire.timed(own, lambda: self._accumulate(own, trained, weight=weight, cycle=int(cycle)))
        else:
            trained = [owners[i] for i in used] if self.masks else []
            found = self._wire.timed(own, lambda: self._sum(own, trained, weight))
        for i, grad in zip(used, found, strict=True):
            result[i] = grad
        return result

    def _sum(self, grads: list[Any], owners: Sequence[Any], weight: tf.Tensor) -> list[Any]:
        linear = self._is_linear()
        sparse = {i: g for i, g in enumerate(grads) if isinstance(g, tf.IndexedSlices)}
        result = list(grads)
        for i, grad in list(sparse.items()):
            if linear and _num_bytes(grad) <= _DENSE_BYTES:
                result[i] = tf.convert_to_tensor(grad)
                del sparse[i]
        dense = [i for i in range(len(grads)) if i not in sparse]
        if dense:
            totals = self._travel([result[i] for i in dense], [owners[i] for i in dense if owners], weight)
            for i, total in zip(dense, totals, strict=True):
                result[i] = total
        for i, grad in sparse.items():
            result[i] = self._sum_slices(grad, weight, f"{self._name}.slices.{i}", merge=linear)
        return result

    def _travel(self, grads: Sequence[Any], owners: Sequence[Any], weight: tf.Tensor) -> list[Any]:
        """The sums of dense gradients; what is pruned is not sent, unless a codec wants sizes that never change."""
        masks = [self.masks.get(id(tensor_of(v))) for v in owners] or [None] * len(grads)
        if self._buckets.coded or not any(mask is not None for mask in masks):
            return self._buckets.sum(grads, weight)
        sent = [g if mask is None else tf.boolean_mask(g, mask) for g, mask in zip(grads, masks, strict=True)]
        return [
            total if mask is None else tf.scatter_nd(tf.where(mask), total, tf.shape(g, tf.int64))
            for g, mask, total in zip(grads, masks, self._buckets.sum(sent, weight), strict=True)
        ]

    def _is_linear(self) -> bool:
        """Whether rows of one index may be added up before the optimizer sees them.

        Keras squares the rows of an ``IndexedSlices`` one by one, in second moments and in norms: where a token occurs
        twice, (a + b)**2 becomes a**2 + b**2. Only if such rows stay apart does the job train what one process trains.
        """
        optimizer = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        clips = any(getattr(optimizer, name, None) for name in ("clipnorm", "global_clipnorm", "clipvalue"))
        return type(optimizer) is keras.optimizers.SGD and not clips

    def _sum_slices(self, grad: tf.IndexedSlices, weight: tf.Tensor, name: str, *, merge: bool) -> tf.IndexedSlices:
        """The slices of all workers; the whole gradient, where that is less than the rows.

        Args:
            grad: This worker's slices.
            weight: What they count.
            name: Name of the collectives.
            merge: Whether rows of one index are added up before they travel.
        """
        values = tf.math.multiply_no_nan(grad.values, tf.cast(weight, grad.values.dtype))
        indices = tf.cast(grad.indices, tf.int64)
        shape = tf.cast(grad.dense_shape, tf.int64)
        limit = shape[0]
        if merge:
            indices, where = tf.unique(indices)
            values = tf.math.unsorted_segment_sum(values, where, tf.shape(indices)[0])
        else:
            row = tf.reduce_prod(shape[1:]) * grad.values.dtype.size
            limit = tf.maximum(limit, _MAX_GATHERED_BYTES // row)
        rows = self._wire.sum(tf.shape(indices, tf.int64)[:1], f"{name}.rows")[0]

        def whole() -> tuple[tf.Tensor, tf.Tensor]:
            own = tf.scatter_nd(indices[:, None], values, shape)
            return self._wire.sum(own, f"{name}.dense"), tf.range(shape[0])

        def gathered() -> tuple[tf.Tensor, tf.Tensor]:
            return self._wire.gather(values, f"{name}.values"), self._wire.gather(indices, f"{name}.indices")

        summed, at = tf.cond(rows > limit, whole, gathered)
        return tf.IndexedSlices(summed, tf.cast(at, grad.indices.dtype), grad.dense_shape)

    def _accumulate(self, grads: list[Any], variables: list[Any], *, weight: tf.Tensor, cycle: int) -> list[Any]:
        """One sum over workers for all micro-steps of a cycle.

        In between, Keras accumulates this worker's own weighted gradients. At the end of the cycle their sum travels;
        the accumulators are cleared, since Keras adds them once more.
        """
        optimizer = self.optimizer
        accumulators = [optimizer._accumulated_gradients[optimizer._get_variable_index(v)] for v in variables]
        last = tf.equal((tensor_of(optimizer._iterations) + 1) % cycle, 0)
        own = [tf.math.multiply_no_nan(g, tf.cast(weight, g.dtype)) for g in grads]

        def travel() -> list[Any]:
            totals = [g + tf.cast(tensor_of(a), g.dtype) for g, a in zip(own, accumulators, strict=True)]
            summed = self._travel(totals, variables, tf.constant(1.0, tf.float64))
            with tf.control_dependencies(summed):
                for a in accumulators:
                    tensor_of(a).assign(tf.zeros_like(tensor_of(a)))
            return summed

        result: list[Any] = tf.cond(last, travel, lambda: list(own))
        return result


def _num_bytes(grad: tf.IndexedSlices) -> int:
    static = tf.get_static_value(grad.dense_shape)
    if static is None:
        return 0
    count = 1
    for n in static:
        count *= int(n)
    return count * int(grad.values.dtype.size)
