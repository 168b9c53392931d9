"""Local synchronisation under Keras: replicas train on their own, and become one again every H steps.

It happens behind the outermost ``apply`` of an optimizer, inside compiled steps too: every rank has made as many steps,
so every rank takes the branch that averages. The arithmetic is that of :mod:`hvdlm.algorithms.outer`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdlm.adapters.keras_bucket import Buckets, make_buckets
from hvdlm.adapters.keras_job import Job
from hvdlm.adapters.keras_reducer import Reducer, tensor_of
from hvdlm.adapters.keras_state import is_random_state
from hvdlm.adapters.keras_wire import KerasWire
from hvdlm.contracts import Collectives
from hvdlm.errors import ConfigError

__all__ = ["LocalSync"]


class LocalSync:
    """Averages what one optimizer trains every ``sync_every`` steps, weighted by samples.

    Args:
        optimizer: The outermost optimizer.
        job: What the parts share; its options say how.
        wire: Collectives.
        statistics: Gives variables of models that are not trained, but change: moving averages.
        bucket_cap_bytes: Largest bucket.
        name: Tells these collectives from those of others.
        synced: Called after each synchronisation, in graphs too.
    """

    def __init__(
        self,
        optimizer: Any,
        *,
        job: Job,
        wire: KerasWire,
        statistics: Callable[[], Sequence[Any]],
        bucket_cap_bytes: float,
        name: str,
        synced: Callable[[], None],
    ) -> None:
        self.optimizer, self._synced = optimizer, synced
        self._job, self._options, self._size = job, job.options, wire.size
        self._statistics = statistics
        cycle = getattr(optimizer, "gradient_accumulation_steps", None) or 1
        self._every = self._options.sync_every * int(cycle)
        codec, cap = self._options.compression.replace("auto", "none"), bucket_cap_bytes
        self._moves = make_buckets(codec, self._options, wire, f"hvdlm.local.{name}", cap)
        self._statistics_moves, self._means = (
            make_buckets("none", self._options, wire, f"hvdlm.local.{name}.{what}", cap)
            for what in ("statistics", "means")
        )
        self._together = self._options.sync_warmup_steps * int(cycle)
        self._reducer: Reducer | None = None
        if self._together:
            plain = replace(self._options, compression="none")
            self._reducer = Reducer(
                optimizer,
                wire=wire,
                weight=job.weight,
                options=plain,
                bucket_cap_bytes=cap,
                name=f"{name}.together",
                weighs_loss=False,
            )
        self._starts: dict[int, tuple[Any, tf.Variable]] = {}
        self._velocities: dict[int, tf.Variable] = {}
        self._given: dict[str, Any] = {}
        with tf.init_scope():  # variables outlive the graph that is being traced
            self._steps = tf.Variable(0, dtype=tf.int64, trainable=False)
            self._seen = tf.Variable(job.seen.read_value(), trainable=False)
            self._made = tf.Variable(0, dtype=tf.int64, trainable=False)

    def reduce(self, grads: Sequence[Any], variables: Sequence[Any] | None) -> list[Any]:
        """This worker's own gradients, as it steps along them, or those of all at first; None stays None."""
        self._take_in(self._trained(variables))
        weight = tf.convert_to_tensor(self._job.weight)
        # A sample that only keeps this worker in step moves nothing, not even where its gradient is a NaN. A loss that
        # is a sum takes the step of the whole batch, from a part of it.
        counts = tf.cast(weight > 0, tf.float64)
        factor = counts if self._options.reduction == "mean" else tf.math.divide_no_nan(counts, weight)
        own = [None if grad is None else _times(grad, factor) for grad in grads]
        return own if self._reducer is None else self._at_first_of_all(self._reducer, own, variables)

    def _at_first_of_all(self, reducer: Reducer, own: list[Any], variables: Sequence[Any] | None) -> list[Any]:
        used = [i for i, grad in enumerate(own) if grad is not None]
        slices: list[bool] = []

        def of_all() -> list[Any]:
            found = reducer.reduce(own, variables)
            slices[:] = [isinstance(found[i], tf.IndexedSlices) for i in used]
            return [found[i] for i in used]

        def of_one() -> list[Any]:
            # What travels dense is dense in the other branch too, which is traced first.
            kept = slices or [True] * len(used)
            return [own[i] if keep else tf.convert_to_tensor(own[i]) for i, keep in zip(used, kept, strict=True)]

        result = list(own)
        for i, grad in zip(used, tf.cond(self._made < self._together, of_all, of_one), strict=True):
            result[i] = grad
        return result

    def applied(self, variables: Sequence[Any] | None) -> None:
        """The optimizer has made its step: average if it is time. Also in graphs."""
        trained = self._trained(variables)

        def meet() -> tf.Tensor:
            self._meet(trained)
            return tf.constant(True)

        def alone() -> tf.Tensor:
            return tf.cond(self._steps.assign_add(1) >= self._every, meet, lambda: tf.constant(False))

        def together() -> tf.Tensor:
            self._made.assign_add(1)
            self._restart()
            return tf.constant(False)

        if self._together:
            tf.cond(self._made < self._together, together, alone)
        else:
            alone()

    def _trained(self, variables: Sequence[Any] | None) -> list[Any]:
        return [tensor_of(v) for v in (self.optimizer._trainable_variables if variables is None else variables)]

    def _moving(self) -> list[Any]:
        return [tensor_of(v) for v in self._statistics() if v.dtype.startswith("float") and not is_random_state(v)]

    def _take_in(self, trained: Sequence[Any]) -> None:
        if self._together and self._moving():
            raise ConfigError(
                f"sync_warmup_steps={self._options.sync_warmup_steps} under Keras, for a model with moving averages "
                "(BatchNormalization): each worker would take them of its own part of a batch.",
                hint="leave sync_warmup_steps out, or use LayerNormalization",
            )
        new = [v for v in [*trained, *self._moving()] if id(v) not in self._starts]
        with tf.init_scope():
            for v in new:
                self._starts[id(v)] = (v, tf.Variable(v.read_value(), trainable=False))
                if self._options.outer_optimizer == "nesterov":
                    velocity = self._velocity(len(self._velocities), v)
                    self._velocities[id(v)] = tf.Variable(velocity, dtype=v.dtype, trainable=False)

    # Becoming one again.

    @property
    def synchronised(self) -> bool:
        """Whether nobody has stepped since the last synchronisation."""
        return not int(self._steps.numpy())

    def synchronise(self) -> None:
        """Make replicas one again, eagerly. Every rank calls it between the same two steps."""
        if not self.synchronised:
            self._meet(self._trained(None))

    def _meet(self, trained: Sequence[Any]) -> None:
        counted = tf.cast(self._job.seen - self._seen, tf.float64)
        # Batches that the script made itself are counted nowhere: every worker counts the same.
        weight = tf.where(counted[2] > 0, tf.math.divide_no_nan(counted[1], counted[2]), 1.0 / self._size)
        moving = self._moving()
        self._become([*trained, *moving], self._moved(self._moves, trained, weight), len(trained), moving, weight)
        if self._options.local_moments == "average":
            slots = self._slots()
            for v, mean in zip(slots, self._means.sum([v.read_value() for v in slots], weight), strict=True):
                v.assign(mean)
        self._synced()
        self._restart()

    def _restart(self) -> None:
        for v, start in self._starts.values():
            start.assign(v)
        self._steps.assign(0)
        self._seen.assign(self._job.seen)

    def _moved(self, buckets: Buckets, variables: Sequence[Any], weight: tf.Tensor) -> list[Any]:
        return buckets.sum([v.read_value() - self._starts[id(v)][1] for v in variables], weight) if variables else []

    def _become(
        self, variables: Sequence[Any], moved: list[Any], outer: int, moving: Sequence[Any], weight: tf.Tensor
    ) -> None:
        lr, momentum = self._options.outer_lr, self._options.outer_momentum
        moved = [*moved, *self._moved(self._statistics_moves, moving, weight)]
        for i, (v, move) in enumerate(zip(variables, moved, strict=True)):
            start = self._starts[id(v)][1]
            if i < outer and self._options.outer_optimizer == "nesterov":
                velocity = self._velocities[id(v)].assign(momentum * self._velocities[id(v)] + move)
                start.assign_add(lr * (move + momentum * velocity))
            else:
                start.assign_add(move)
            v.assign(start)

    def _slots(self) -> list[Any]:
        own = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        rate = own._learning_rate
        slots = [v for v in own.variables if v is not rate and v.dtype.startswith("float")]
        return [tensor_of(v) for v in slots]

    # State, between two synchronisations.

    def state(self) -> dict[str, Any]:
        """What the codec remembers, and the outer optimizer, by number of the variable."""
        velocity = {str(i): v.numpy() for i, v in enumerate(self._velocities.values())}
        return {**self._moves.state(), "velocity": velocity, "together": {"steps": int(self._made.numpy())}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`; variables are the restored ones, equal on every rank."""
        self._moves.load_state(state)
        self._given = dict(state.get("velocity", {}))
        self._made.assign(int(state.get("together", {}).get("steps", 0)))
        for i, v in enumerate(self._velocities.values()):
            v.assign(self._velocity(i, v))
        self._restart()

    def _velocity(self, number: int, like: tf.Tensor) -> Any:
        given = self._given.get(str(number))
        return tf.zeros_like(like) if given is None else np.asarray(given).reshape(like.shape)

    def pool(self, collectives: Collectives) -> None:
        """See :meth:`hvdlm.adapters.keras_bucket.Buckets.pool`."""
        self._moves.pool(collectives)


def _times(grad: Any, factor: tf.Tensor) -> Any:
    if isinstance(grad, tf.IndexedSlices):
        return tf.IndexedSlices(_times(grad.values, factor), grad.indices, grad.dense_shape)
    grad = keras.ops.convert_to_tensor(grad)
    return tf.math.multiply_no_nan(grad, tf.cast(factor, grad.dtype))
