"""Recognises Keras models, optimizers and data sets, as a script makes and uses them."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras.src.optimizers.base_optimizer import BaseOptimizer

from hvdlm.autowrap.imports import AfterImport
from hvdlm.autowrap.places import is_own, place
from hvdlm.autowrap.scope import Scope
from hvdlm.contracts import Kind

__all__ = ["KerasHooks", "install"]


def install(scope: Scope) -> list[Callable[[], None]]:
    """Watch Keras; returns what ends it."""
    return KerasHooks(scope).install()


class KerasHooks:
    """Watches the classes of Keras for one scope."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._undo: list[Callable[[], None]] = []
        self._trained_on: str | None = None
        self._sharded: Any = None

    def install(self) -> list[Callable[[], None]]:
        """Start watching; returns what ends it."""
        for method in ("fit", "train_on_batch"):
            self._watch_model(method)
        init = BaseOptimizer.__init__
        self._set(BaseOptimizer, "__init__", self._optimizer_made(init))
        self._set(BaseOptimizer, "apply", self._applied(BaseOptimizer.__dict__["apply"]))
        tensorflow = AfterImport({"tensorflow": self._watch_data})
        tensorflow.install()
        self._undo.append(tensorflow.remove)
        return self._undo

    def _set(self, owner: Any, name: str, value: Any) -> None:
        own = name in owner.__dict__
        original = owner.__dict__.get(name)
        setattr(owner, name, value)

        def undo() -> None:
            if owner.__dict__.get(name) is value:
                setattr(owner, name, original) if own else delattr(owner, name)

        self._undo.append(undo)

    def _watch_model(self, method: str) -> None:
        original = getattr(keras.Model, method)

        @functools.wraps(original)
        def watched(model: Any, *args: Any, **kwargs: Any) -> Any:
            if self._scope.busy or self._scope.is_attached(model) or not getattr(model, "compiled", False):
                return original(model, *args, **kwargs)
            name = f"{type(model).__name__} {model.name}"
            self._scope.attach("keras", [(name, "model", model)], iter([self._line(name, model, method)]))
            self._scope.has_data = True
            return getattr(model, method)(*args, **kwargs)

        self._set(keras.Model, method, watched)

    @staticmethod
    def _line(name: str, model: Any, method: str) -> str:
        optimizer = type(model.optimizer).__name__
        return f"model {name}, {method} at {place(3)}: data shared out, gradients of {optimizer} reduced"

    def _optimizer_made(self, original: Any) -> Any:
        @functools.wraps(original)
        def init(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            original(optimizer, *args, **kwargs)
            self._scope.note(optimizer, "optimizer")

        return init

    def _applied(self, original: Any) -> Any:
        @functools.wraps(original)
        def apply(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            if self._is_mine(optimizer):
                import tensorflow as tf

                with tf.init_scope():
                    self._attach()
                    self._scope.session("keras").adapter.randomise(
                        self._scope.session("keras").resolved.options.seed, self._scope.session("keras").world.rank
                    )
                return optimizer.apply(*args, **kwargs)  # now with the adapter's watch over it
            return original(optimizer, *args, **kwargs)

        return apply

    def _is_mine(self, optimizer: Any) -> bool:
        """Whether a loop of the script's own applies gradients with an optimizer that is not attached yet."""
        scope = self._scope
        if scope.busy or keras.config.backend() != "tensorflow" or scope.is_attached(optimizer):
            return False
        if any(optimizer is getattr(m, "optimizer", None) and scope.is_attached(m) for m in _models()):
            return False
        return any(value is optimizer for value, _, _ in scope.pending())

    def _attach(self) -> None:
        scope = self._scope
        models = [m for m in _models() if m.built and not scope.is_attached(m)]
        found: list[tuple[str, Kind, Any]] = [(f"{type(m).__name__} {m.name}", "model", m) for m in models]
        lines = [f"model {name}: equal on all workers" for name, _, _ in found]
        for value, _, where in scope.pending():
            found.append((f"{type(value).__name__} at {where}", "optimizer", value))
            lines.append(f"optimizer {found[-1][0]}: gradients reduced")
        if found:
            scope.attach("keras", found, iter(lines))

    def _watch_data(self, tf: Any) -> None:
        dataset = tf.data.Dataset
        original = dataset.__iter__

        @functools.wraps(original)
        def iterate(data: Any) -> Iterator[Any]:
            frame = sys._getframe(1)
            if self._scope.busy or not is_own(frame.f_code.co_filename) or not tf.executing_eagerly():
                return original(data)  # type: ignore[no-any-return]  # the original has no types
            own = self._stand_in(data, place(2))
            return original(data) if own is None else iter(own)

        self._set(dataset, "__iter__", iterate)

    def _stand_in(self, data: Any, where: str) -> Any:
        """The data set a loop of the script's own trains on is the one that is looped over first once there is an
        optimizer; those that are looped over elsewhere (validation) are read whole.
        """
        scope = self._scope
        if scope.has_pending_optimizer:
            self._attach()
        if scope.framework != "keras" or self._trained_on not in (None, where):
            return None
        if self._sharded is None:
            if scope.has_data:
                return None  # fit has the data
            name = f"{type(data).__name__} at {where}"
            (self._sharded,) = scope.attach("keras", [(name, "loader", data)], iter([f"{name}: shared out"]))
            scope.has_data, self._trained_on = True, where
        if self._sharded._dataset is not data:
            self._sharded = self._sharded.like(data)
        return self._sharded


def _models() -> list[Any]:
    """The outermost Keras models there are."""
    models = [v for v in gc.get_objects() if issubclass(type(v), keras.Model) and hasattr(v, "_layers")]
    inside = {id(layer) for model in models for layer in model._flatten_layers(include_self=False)}
    inside |= {id(getattr(model, "_functional", None)) for model in models}  # what a Sequential runs
    return [model for model in models if id(model) not in inside]
