"""``fit``, ``evaluate`` and ``predict`` of one model of ``tf_keras`` (Keras 2), shared out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras
from keras.src import tree
from keras.src.trainers.data_adapters import array_slicing

from hvdlm.adapters.keras_callbacks import Closing, Opening
from hvdlm.adapters.keras_data import COUNTS, DATA
from hvdlm.adapters.keras_feeds import original_of, training_feed
from hvdlm.adapters.keras_job import Job
from hvdlm.adapters.keras_metrics import weighted_means
from hvdlm.errors import ConfigError, RecognitionError

__all__ = ["LegacyModel"]

_WRITERS = tuple(
    getattr(tf_keras.callbacks, name)
    for name in ("ModelCheckpoint", "CSVLogger", "TensorBoard", "ProgbarLogger", "RemoteMonitor")
)


class LegacyModel:
    """See :class:`hvdlm.adapters.keras_model.DistributedModel`."""

    def __init__(self, model: Any, name: str, job: Job, prepare: Callable[[Any], None]) -> None:
        self.model, self._name, self._job, self._prepare = model, name, job, prepare
        self._passes = 0
        stand_ins: dict[str, Callable[..., Any]] = {
            "fit": self._fit,
            "train_on_batch": self._train_on_batch,
            "evaluate": self._evaluate,
            "predict": self._predict,
            "train_step": self._train_step,
        }
        self._own = {method: getattr(model, method) for method in stand_ins}
        for method, stand_in in stand_ins.items():
            setattr(model, method, stand_in)
        model.train_function = None

    def remove(self) -> None:
        """Give the model its own methods back."""
        for method in self._own:
            self.model.__dict__.pop(method, None)
        self.model.train_function = None

    def _fit(self, *args: Any, **kwargs: Any) -> Any:
        model, job = self.model, self._job
        call = inspect.signature(self._own["fit"]).bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        if not model._is_compiled:
            return self._own["fit"](*args, **kwargs)  # Keras says what is missing
        if given["validation_split"] and given["validation_data"] is None:
            arrays = (given["x"], given["y"], given["sample_weight"])
            split = array_slicing.train_validation_split(arrays, validation_split=given["validation_split"])
            (given["x"], given["y"], given["sample_weight"]), given["validation_data"] = split
            given["validation_split"] = 0.0
        given["validation_data"] = original_of(given["validation_data"])
        if given["validation_data"] is not None and not isinstance(given["validation_data"], tf.data.Dataset):
            given["validation_batch_size"] = given["validation_batch_size"] or given["batch_size"]
        feed = training_feed(given, self._name, job)
        if not model.built:
            example = feed.example()
            model(example[0] if isinstance(example, tuple) else example)
        self._prepare(model)
        if job.world.size > 1 and model._jit_compile:
            raise ConfigError(
                f"{self._name}: steps compiled with jit_compile cannot sum gradients.",
                hint="compile without jit_compile",
            )
        given.update(x=feed.dataset, y=None, sample_weight=None, class_weight=None, shuffle=False, batch_size=None)
        offset = self._passes - given["initial_epoch"] if self._passes else 0

        def passes(number: int) -> None:
            self._passes = max(self._passes, number + 1)

        opening = Opening(job, feed, offset=offset, passes=passes, model=model)
        self._arrange(given, opening, Closing(job, model))
        try:
            result = self._own["fit"](*call.args, **call.kwargs)
        finally:
            job.uncounted()
        job.collectives.allgather(b"")  # rank 0 writes files that the script may read next
        return result

    def _arrange(self, given: dict[str, Any], opening: Opening, closing: Closing) -> None:
        own = given["callbacks"]
        own = own.callbacks if isinstance(own, tf_keras.callbacks.CallbackList) else tree.flatten(own or [])
        if any(isinstance(c, tf_keras.callbacks.BackupAndRestore) for c in own) and self._job.world.size > 1:
            raise ConfigError(
                f"{self._name}: BackupAndRestore of tf_keras restores one worker only.",
                hint="use ModelCheckpoint and load the weights before hvdlm gets the model, or Keras 3: import keras",
            )
        if not self._job.world.is_main:
            own = [c for c in own if not isinstance(c, _WRITERS)]
            given["verbose"] = 0
        elif given["verbose"] == "auto":
            given["verbose"] = 2
        given["callbacks"] = [_Bridge(opening, self._job), *own, _Bridge(closing, None)]

    def _train_step(self, data: Any) -> Any:
        if not isinstance(data, dict) or COUNTS not in data:
            return self._own["train_step"](data)
        counts, data = data[COUNTS], data[DATA]
        self._job.counts(counts)
        if self._job.world.size == 1:
            return self._own["train_step"](data)
        variables = [v for metric in self.model.metrics for v in metric.variables]
        before = [tf.identity(v) for v in variables]
        result = self._own["train_step"](data)
        for v, old in zip(variables, before, strict=False):
            v.assign(tf.where(counts[0] > 0, v, old))
        return result

    def _train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        if self._job.world.size > 1:
            raise RecognitionError(
                f"{self._name}: train_on_batch of tf_keras is not shared out.",
                hint="use fit, or a loop of your own over a tf.data.Dataset, or Keras 3: import keras",
            )
        return self._own["train_on_batch"](*args, **kwargs)

    def _evaluate(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not self._job.world.is_main:
            kwargs["verbose"] = 0
        return self._own["evaluate"](original_of(x), *args, **kwargs)

    def _predict(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return self._own["predict"](original_of(x), *args, **kwargs)


class _Bridge(tf_keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types
    """Lets a callback written for Keras 3 act in a ``fit`` of Keras 2."""

    def __init__(self, inner: Any, job: Job | None) -> None:
        super().__init__()
        self._inner, self._job = inner, job

    def on_train_begin(self, logs: Any = None) -> None:
        self._inner.set_params(self.params)
        self._inner.on_train_begin(logs)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._inner.on_epoch_begin(epoch, logs)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._inner.on_train_batch_end(batch, logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._job is not None and self._job.world.size > 1 and logs:
            # Means over samples: those of losses and accuracies are what one process has.
            names = [name for name in logs if not name.startswith("val_")]
            own = [float(np.asarray(logs[name])) for name in names]
            means = weighted_means(own, self._job.collectives, self._job.epoch_samples())
            logs.update(zip(names, means, strict=True))
        self._inner.on_epoch_end(epoch, logs)
