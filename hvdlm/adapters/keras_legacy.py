"""Models of ``tf_keras`` (Keras 2): the data plan, weighting and buckets of Keras 3 on TensorFlow.

Keras 2 applies gradients through ``optimizer.apply_gradients``, which is where Horovod's own optimizer for it sums them
too; here the sums are weighted by samples, so that uneven tails come out as in one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from hvdlm.adapters.keras_adapter import KerasAdapter
from hvdlm.adapters.keras_feeds import ShardedDataset
from hvdlm.adapters.keras_job import Job
from hvdlm.adapters.keras_legacy_fit import LegacyModel
from hvdlm.adapters.keras_objects import refuse_model, refuse_optimizer, refuse_torch
from hvdlm.adapters.keras_options import refuse_options
from hvdlm.adapters.keras_reducer import Reducer
from hvdlm.adapters.keras_state import broadcast_variables, fingerprint, is_random_state
from hvdlm.agreement import agree
from hvdlm.balancing import starting_weights
from hvdlm.contracts import Fingerprint, Kind, Recorder
from hvdlm.errors import RecognitionError
from hvdlm.options import Options, lr_factor
from hvdlm.world import World

__all__ = ["LegacyKerasAdapter"]

Found = Sequence[tuple[str, Kind, Any]]
_OPTIMIZERS = (tf_keras.optimizers.Optimizer,)


class LegacyKerasAdapter(KerasAdapter):
    """See :class:`hvdlm.contracts.Adapter`."""

    name = "keras"
    data_comes_with_fit = True

    def __init__(self) -> None:
        super().__init__()
        self._own_apply: list[Any] = []

    def recognise(self, value: object) -> Kind | None:
        """See :class:`hvdlm.contracts.Adapter`."""
        if isinstance(value, tf_keras.Model):
            return "model"
        if isinstance(value, _OPTIMIZERS):
            return "optimizer"
        if isinstance(value, tf.data.Dataset):
            return "loader"
        refuse_torch(value)
        return None

    def signature(self, found: Found) -> list[str]:
        """See :class:`hvdlm.contracts.Adapter`."""
        models = [line for where, kind, value in found if kind == "model" for line in _lines(where, value)]
        return [*models, *(f"{where}: {type(value).__name__}" for where, kind, value in found if kind == "optimizer")]

    def attach(self, found: Found, options: Options, world: World, recorder: Recorder) -> list[Any]:
        """See :class:`hvdlm.contracts.Adapter`."""
        refuse_options(options, "tf_keras")
        if self._job is None:
            self._job = Job(
                options=options,
                world=world,
                collectives=self.collectives,
                recorder=recorder,
                weights=starting_weights(options, world, self.collectives),
            )
        job, replaced = self._job, []
        for where, kind, value in found:
            if kind == "optimizer":
                refuse_optimizer(where, value)
                self._watched(value)
            elif kind == "model":
                refuse_model(where, value)
                _refuse_batch_norm(where, value, options, world)
                wrapped: Any = LegacyModel(value, where, job, self._prepare)  # stands in for a DistributedModel
                self._models[id(value)] = (where, value, wrapped)
                if value.built:
                    self._prepare(value)
            elif kind == "loader":
                self._datasets += 1
                value = ShardedDataset(value, where, job) if self._datasets == 1 else value
            replaced.append(value)
        return replaced

    def _prepare(self, model: Any) -> None:
        assert self._job is not None
        where, optimizer = self._models[id(model)][0], getattr(model, "optimizer", None)
        slots = []
        if optimizer is not None:
            self._belongs(optimizer, where)
            optimizer.build(model.trainable_variables)
            slots = list(optimizer.variables)
        if self._wire is None:
            return
        variables = [v for v in [*model.variables, *slots] if id(v) not in self._equal]
        if variables:
            agree(self.collectives, _lines(where, model))
            broadcast_variables(variables, self.collectives)
            self._equal.update((id(v), v) for v in variables)
        if optimizer is not None:
            self._watched(optimizer)

    def _watched(self, optimizer: Any) -> None:
        """Make ``apply_gradients`` of one optimizer sum first."""
        if self._wire is None or any(o is optimizer for o, _ in self._own_apply):
            return
        assert self._job is not None
        own, options = optimizer.apply_gradients, self._job.options
        reducer = _LegacyReducer(
            optimizer,
            wire=self._wire,
            weight=self._job.weight,
            options=options,
            bucket_cap_bytes=(options.bucket_cap_mb or 32.0) * 2**20,
            name=f"legacy{len(self._own_apply)}",
        )

        def apply_gradients(grads_and_vars: Any, *args: Any, **kwargs: Any) -> Any:
            pairs = list(grads_and_vars)
            variables = [v for _, v in pairs]
            grads = reducer.reduce([g for g, _ in pairs], variables)
            return own(list(zip(grads, variables, strict=True)), *args, **kwargs)

        optimizer.apply_gradients = apply_gradients
        self._own_apply.append((optimizer, own))
        rate = optimizer.learning_rate
        if options.lr_scale != "none" and hasattr(rate, "assign"):
            rate.assign(rate * lr_factor(options, self._job.world.size))

    def fingerprints(self) -> list[Fingerprint]:
        """See :class:`hvdlm.contracts.Adapter`."""
        trained = {id(v) for _, model, _ in self._models.values() for v in model.trainable_variables}
        return [Fingerprint(v.name, fingerprint(v), id(v) in trained) for v in self._variables()]

    def resync(self, names: Sequence[str], root: int) -> None:
        """See :class:`hvdlm.contracts.Adapter`."""
        slots = [v for optimizer, _ in self._own_apply for v in optimizer.variables]
        wanted = [v for v in self._variables() if v.name in set(names)]
        broadcast_variables([*wanted, *slots], self.collectives, root)

    def _variables(self) -> list[Any]:
        return [v for _, m, _ in self._models.values() for v in m.variables if not is_random_state(v)]

    def detach(self) -> None:
        """See :class:`hvdlm.contracts.Adapter`."""
        super().detach()
        for optimizer, _ in self._own_apply:
            optimizer.__dict__.pop("apply_gradients", None)
        self._own_apply.clear()


class _LegacyReducer(Reducer):
    def _is_linear(self) -> bool:
        # Keras 2 adds up rows of one index itself, after clipping.
        optimizer = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        return not any(getattr(optimizer, name, None) for name in ("clipnorm", "global_clipnorm", "clipvalue"))


def _lines(where: str, model: Any) -> list[str]:
    return [f"{where}.{v.name}: {tuple(v.shape)} {v.dtype.name} trainable={v.trainable}" for v in model.variables]


def _refuse_batch_norm(where: str, model: Any, options: Options, world: World) -> None:
    norms = tf_keras.layers.BatchNormalization
    if world.size > 1 and options.batch_norm == "sync" and any(isinstance(m, norms) for m in model._flatten_layers()):
        raise RecognitionError(
            f"{where} has BatchNormalization, whose statistics over all workers are not available for tf_keras.",
            hint='set batch_norm="local" (each worker uses the statistics of its part), or use Keras 3: import keras',
        )
