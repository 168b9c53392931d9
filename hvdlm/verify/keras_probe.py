"""What the probe sees of a Keras script (on TensorFlow), whose compiled functions run eagerly for it."""

from __future__ import annotations

import functools
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from hvdlm.autowrap.places import is_own
from hvdlm.verify.probe import SAMPLES, Probe, digest
from hvdlm.verify.trace import Step

__all__ = ["KerasProbe"]

_RANDOM = ("Dropout", "Noise", "Random")
"""Parts of the names of layers that draw random numbers while training."""


class KerasProbe:
    """Watches Keras in this process.

    Args:
        probe: What is written down.
        keras: The module.
    """

    def __init__(self, probe: Probe, keras: ModuleType) -> None:
        import tensorflow as tf

        self._probe, self._keras, self._tf = probe, keras, tf
        self._tapes = self._depth = self._applying = 0
        self._announced = False
        self._computed: list[Any] = []
        self._trained: list[Any] = []

    def watch(self) -> None:
        """Start."""
        from hvdlm.adapters.keras_adapter import KerasAdapter

        keras, tf, probe = self._keras, self._tf, self._probe
        # What a graph computes cannot be looked at while it is computed.
        tf.config.run_functions_eagerly(True)
        probe.closing, probe.initial = self._close, _initial
        _patch(tf.GradientTape, "__enter__", self._tape_entered)
        _patch(tf.GradientTape, "__exit__", self._tape_left)
        _patch(tf.GradientTape, "gradient", self._gradient)
        _patch(tf.data.Dataset, "__iter__", self._iterated)
        _patch(keras.layers.Layer, "__call__", self._called)
        _patch(keras.Model, "fit", self._fit)
        base = next(c for c in keras.optimizers.Optimizer.__mro__ if "_backend_update_step" in c.__dict__)
        _patch(base, "_backend_update_step", self._update)
        for cls in keras.optimizers.Optimizer.__mro__:
            if "apply" in cls.__dict__:
                _patch(cls, "apply", self._apply)
        _patch(KerasAdapter, "_before_apply", self._before_reduction)
        _patch(KerasAdapter, "_prepare", self._prepared)
        for name in ("save", "save_weights", "export"):
            _patch(keras.Model, name, self._saving)
        for name in ("save_model", "save_weights"):
            _patch(keras.saving, name, self._saving_function)
        keras.models.save_model = keras.saving.save_model
        for name in ("save", "write"):
            _patch(tf.train.Checkpoint, name, self._saving)

    def _tape_entered(self, original: Any, tape: Any) -> Any:
        self._tapes += 1
        return original(tape)

    def _tape_left(self, original: Any, tape: Any, *args: Any) -> Any:
        self._tapes -= 1
        return original(tape, *args)

    def _gradient(self, original: Any, tape: Any, target: Any, sources: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(hasattr(v, "assign") for v in self._tf.nest.flatten(sources)):
            return original(tape, target, sources, *args, **kwargs)  # of an input: a penalty, not a step
        self._probe.backward()
        losses = [float(self._tf.reduce_sum(t)) for t in self._tf.nest.flatten(target)]
        self._probe.trace.losses.append(sum(losses))
        grads = original(tape, target, sources, *args, **kwargs)
        self._computed = self._tf.nest.flatten(grads)
        return grads

    def _iterated(self, original: Any, data: Any) -> Iterator[Any]:
        if is_own(sys._getframe(2).f_code.co_filename) and self._tf.executing_eagerly():
            self._probe.trace.unshared = max(0, int(data.cardinality()))
        return original(data)  # type: ignore[no-any-return]  # the original has no types

    def _fit(self, original: Any, model: Any, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        from hvdlm.adapters.keras_data import COUNTS

        spec = getattr(x, "element_spec", None)
        shared = isinstance(spec, dict) and COUNTS in spec
        self._probe.trace.unshared = 0 if shared else _batches(self._tf, x, kwargs.get("batch_size") or 32)
        return original(model, x, *args, **kwargs)

    def _called(self, original: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
        outermost = not self._depth and self._tapes and isinstance(layer, self._keras.Model)
        if outermost and self._tf.executing_eagerly():
            tensors = [self._tf.convert_to_tensor(t) for t in self._tf.nest.flatten((args, kwargs)) if _is_array(t)]
            rows = tensors[0].numpy() if tensors else ()
            self._probe.trace.batches.append([digest(np.ascontiguousarray(row).data) for row in rows])
        self._depth += 1
        try:
            return original(layer, *args, **kwargs)
        finally:
            self._depth -= 1
            if outermost:
                self._look_at(layer)

    def _look_at(self, model: Any) -> None:
        trace = self._probe.trace
        for layer in model._flatten_layers():
            name = type(layer).__name__
            rates = [getattr(layer, n, 0) for n in ("dropout", "recurrent_dropout", "_dropout")]
            rates += [getattr(layer, "rate", 1) if "Dropout" in name else 1] * any(part in name for part in _RANDOM)
            trace.dropout |= any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)
            trace.batch_norms |= isinstance(layer, self._keras.layers.BatchNormalization)

    def _before_reduction(self, original: Any, adapter: Any, optimizer: Any, grads: Any, variables: Any) -> Any:
        """On several workers: the gradients that the script applies, before they are summed."""
        self._attempt(grads)
        self._announced = True
        known = {id(v) for _, model, _ in adapter._models.values() for v in model.variables}
        trained = optimizer._trainable_variables if variables is None else variables
        if known:
            self._probe.trace.unknown = [v.path for v in trained if hasattr(v, "path") and id(v) not in known]
        return original(adapter, optimizer, grads, variables)

    def _attempt(self, grads: Sequence[Any]) -> None:
        trace = self._probe.trace
        trace.attempts += 1
        if self._computed and not _equal(self._computed, list(grads)):
            trace.hooks = ["what the script does between tape.gradient and apply"]

    def _apply(self, original: Any, optimizer: Any, grads: Any, *args: Any, **kwargs: Any) -> Any:
        grads = list(grads)
        if not self._applying and not self._announced:
            self._attempt(grads)
        self._applying += 1
        try:
            return original(optimizer, grads, *args, **kwargs)
        finally:
            self._applying -= 1
            self._announced = self._announced and self._applying > 0

    def _update(self, original: Any, optimizer: Any, grads: Any, variables: Any, rate: Any) -> Any:
        trace = self._probe.trace
        if not self._tf.executing_eagerly() or len(trace.steps) >= self._probe.limit:
            return original(optimizer, grads, variables, rate)
        self._trained = list(variables)
        trace.start = trace.start or _sample(self._trained)[1]
        step = Step(float(rate), *_sample(grads), {})
        result = original(optimizer, grads, variables, rate)
        trace.times.append(time.perf_counter())
        step.digests = {_name(v): _digest(v) for v in self._trained}
        step.values = _sample(self._trained)[1]
        if all(math.isfinite(v) for v in (step.norm, step.lr)):
            trace.steps.append(step)
        if len(trace.steps) == 1:
            trace.parameters = sum(int(np.prod(v.shape)) for v in self._trained)
            trace.state_bytes = sum(_array(v).nbytes for v in optimizer.variables if len(v.shape))
        return result

    def _prepared(self, original: Any, adapter: Any, model: Any) -> Any:
        self._probe.note_initial(adapter._models[id(model)][0], model)
        return original(adapter, model)

    def _saving(self, original: Any, thing: Any, path: Any = None, *args: Any, **kwargs: Any) -> str:
        self._probe.trace.saved.append(str(path or kwargs.get("filepath")))
        return str(path)

    def _saving_function(self, original: Any, thing: Any, path: Any = None, *args: Any, **kwargs: Any) -> None:
        self._saving(original, thing, path, *args, **kwargs)

    def _close(self) -> None:
        mine = {id(v) for v in self._trained}
        buffers = self._probe.trace.buffers
        layers = {
            id(layer): layer
            for model in gc.get_objects()
            if issubclass(type(model), self._keras.Model) and hasattr(model, "_layers")
            if mine & {id(v) for v in model.variables}
            for layer in model._flatten_layers()
        }
        for layer in layers.values():
            for variable in layer._non_trainable_variables:
                key = f"{type(layer).__name__}.{variable.path}"
                buffers[key] = buffers.get(key, "") + _digest(variable)


def _patch(owner: Any, name: str, watched: Callable[..., Any]) -> None:
    """Call ``watched(original, ...)`` instead of ``owner.name(...)``."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return watched(original, *args, **kwargs)

    setattr(owner, name, method)


def _initial(model: Any) -> dict[str, str]:
    variables = getattr(model, "trainable_variables", ())
    return {str(i): _digest(v) for i, v in enumerate(variables)}


def _batches(tf: Any, data: Any, batch_size: int) -> int:
    """Batches in what was given to ``fit``; 0 if not known."""
    if isinstance(data, tf.data.Dataset):
        return max(0, int(data.cardinality()))
    arrays = [a for a in tf.nest.flatten(data) if _is_array(a)] if not hasattr(data, "__getitem__") else [data]
    return -(-len(arrays[0]) // batch_size) if arrays and hasattr(arrays[0], "shape") else 0


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and len(value.shape) > 0 and not hasattr(value, "assign")


def _array(value: Any) -> Any:
    """Of a variable, a tensor or slices; dense."""
    import tensorflow as tf

    value = tf.convert_to_tensor(value) if isinstance(value, tf.IndexedSlices) else value
    return np.asarray(getattr(value, "value", value))


def _digest(variable: Any) -> str:
    return digest(np.ascontiguousarray(_array(variable)).data)


def _name(variable: Any) -> str:
    return str(getattr(variable, "path", variable.name))


def _sample(values: Sequence[Any]) -> tuple[float, list[float]]:
    """(2-norm of all, elements at fixed places)."""
    parts = [_array(v).astype(np.float64).ravel() for v in values if v is not None]
    flat = np.concatenate(parts) if parts else np.zeros(1)
    return float(np.linalg.norm(flat)), flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].tolist()


def _equal(one: list[Any], other: list[Any]) -> bool:
    if len(one) != len(other):
        return False
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not b]
    return all(a is not None and b is not None and np.array_equal(_array(a), _array(b)) for a, b in pairs)
