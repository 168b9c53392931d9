"""Makes one Keras model's own ``fit``, ``train_on_batch``, ``evaluate`` and ``predict`` distributed.

They are replaced on this one object until :meth:`DistributedModel.remove`; its class and what is saved stay the same.
"""

from __future__ import annotations

import functools
import inspect
import logging
import warnings
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras.src import tree
from keras.src.trainers.data_adapters import array_slicing, data_adapter_utils
from keras.src.utils.python_utils import pythonify_logs

from hvdlm.adapters.keras_callbacks import Closing, Opening, arrange
from hvdlm.adapters.keras_data import COUNTS, DATA, ArrayFeed, Feed
from hvdlm.adapters.keras_feeds import cut_by_hand, original_of, own_part, training_feed
from hvdlm.adapters.keras_job import Job
from hvdlm.adapters.keras_metrics import global_results, metric_variables, metrics_built
from hvdlm.adapters.keras_place import FITS, history_of
from hvdlm.errors import RecognitionError

__all__ = ["DistributedModel"]

_log = logging.getLogger("hvdlm")


class DistributedModel:
    """A model whose training is shared out.

    Args:
        model: The person's model.
        name: Where it was found, for messages.
        job: What the parts share.
        prepare: Called when the model has its variables and is about to train: makes replicas start alike.
    """

    def __init__(self, model: Any, name: str, job: Job, prepare: Callable[[Any], None]) -> None:
        self.model, self._name, self._job, self._prepare = model, name, job, prepare
        self._passes = 0
        self._in_training = False
        self._evaluated: int | None = None
        """Samples that this worker reads in an evaluation that is shared out; None if it reads all."""
        self._keeps_fillers_out = False
        self._own: dict[str, Any] = {}
        for method, stand_in in (
            ("compile", self._compile),
            ("fit", self._fit),
            ("evaluate", self._evaluate),
            ("predict", self._predict),
            ("train_on_batch", self._train_on_batch),
            ("train_step", self._train_step),
            ("_get_metrics_result_or_logs", self._results),
        ):
            original = getattr(model, method)
            self._own[method] = original
            setattr(model, method, _like(original, stand_in))
        self._forget_traces()
        if getattr(model, "compiled", False):
            self._refuse_jit()

    def remove(self) -> None:
        """Give the model its own methods back."""
        for method in self._own:
            self.model.__dict__.pop(method, None)
        self._forget_traces()

    def _forget_traces(self) -> None:
        for name in ("train_function", "test_function"):
            if getattr(self.model, name, None) is not None:
                setattr(self.model, name, None)

    def _compile(self, *args: Any, **kwargs: Any) -> None:
        self._own["compile"](*args, **kwargs)
        self._refuse_jit()

    def _refuse_jit(self) -> None:
        if self._job.world.size == 1:
            return
        if self.model.jit_compile and self._job.world.is_main:
            # XLA on CPUs has no Horovod operations. "auto" chooses it where there is a GPU.
            _log.warning("%s: jit_compile is turned off: compiled steps cannot sum gradients", self._name)
        self.model.jit_compile = False

    def _fit(self, *args: Any, **kwargs: Any) -> Any:
        model, job = self.model, self._job
        call = inspect.signature(self._own["fit"]).bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        if "x" not in given:
            raise RecognitionError(
                f"{self._name}: fit of {type(model).__name__} takes no x, so that hvdlm cannot share out its data.",
                hint="give fit the parameters of keras.Model.fit, or use a training loop of your own",
            )
        if not getattr(model, "compiled", False):
            return self._own["fit"](*args, **kwargs)  # Keras says what is missing
        if given.get("validation_split") and given.get("validation_data") is None:
            arrays = (given["x"], given.get("y"), given.get("sample_weight"))
            split = array_slicing.train_validation_split(arrays, validation_split=given["validation_split"])
            (given["x"], given["y"], given["sample_weight"]), given["validation_data"] = split
            given["validation_split"] = 0.0
        place, number = job.place, job.calls
        job.calls += 1
        if job.course.skipping and number < place.fits:
            model.history = history_of(place.earlier[number])
            return model.history
        given["validation_data"] = original_of(given.get("validation_data"))
        validation = self._shared_validation(given["validation_data"])
        if validation is not None:
            given["validation_data"] = validation[:-1]
        feed = training_feed(given, self._name, job)
        self._time(feed)
        self._build(feed)
        job.course.done(FITS, number)
        job.course.grown()
        self._passes = place.passes.get(self._name, self._passes)
        resumed = place.resumed
        place.reads(feed.source() if isinstance(feed, ArrayFeed) else None)
        if resumed:
            steps = given.get("steps_per_epoch")
            whole = feed.dataset
            feed.resume(place.cursor, None if steps is None else (place.epoch, steps))
            if feed.dataset is not whole:
                self._time(feed)
            given["initial_epoch"] = given["epochs"] if place.stopped else place.epoch
        given.update(x=feed.dataset, y=None, sample_weight=None, class_weight=None, shuffle=False)
        given["batch_size"], batch_size = None, given.get("batch_size")
        if given.get("validation_data") is not None and not given.get("validation_batch_size"):
            given["validation_batch_size"] = _validation_batch_size(given["validation_data"], batch_size)
        offset = self._passes - given.get("initial_epoch", 0) if self._passes else 0
        if resumed:
            offset = place.cursor.epoch - place.epoch

        def passes(number: int) -> None:
            self._passes = max(self._passes, number + 1)
            place.passes[self._name] = self._passes

        self._keep_fillers_out(feed)
        arrange(
            given,
            opening=Opening(job, feed, offset=offset, passes=passes, model=model),
            closing=Closing(job, model, feed, given.get("steps_per_epoch")),
            job=job,
        )
        job.training = model
        self._in_training, self._evaluated = True, None if validation is None else validation[-1]
        try:
            with warnings.catch_warnings():
                if resumed:  # the rest of a pass is shorter than Keras expects
                    warnings.filterwarnings("ignore", "Your input ran out of data")
                result = self._own["fit"](*call.args, **call.kwargs)
        finally:
            self._in_training, self._evaluated, job.training = False, None, None
            job.uncounted()
        # Rank 0 writes files that the script may read next.
        job.collectives.allgather(b"")
        if resumed:
            history = history_of(place.logs)
            result.epoch, result.history = history.epoch, history.history
        place.fit_done()
        return result

    def _time(self, feed: Feed) -> None:
        # Before an example is read: a shuffle draws its orders anew for each dataset that is made of it.
        if self._job.options.timings_every:
            feed.dataset = self._job.reading.timed(feed.dataset)

    def _shared_validation(self, data: Any) -> tuple[Any, ...] | None:
        if data is None:
            return None
        x, y, sample_weight = data_adapter_utils.unpack_x_y_sample_weight(data)
        return own_part(x, y, sample_weight, self._job)

    def _build(self, feed: Feed) -> None:
        """Make every variable of model, metrics and optimizer, so that all can be made equal before the first step."""
        model = self.model
        if not all(layer.built for layer in model._flatten_layers()) or not metrics_built(model):
            self._symbolic_build(feed.example())
        self._prepare(model)

    def _symbolic_build(self, batch: Any) -> None:
        # A model with a train_step of its own may have neither loss nor metrics that Keras could build.
        try:
            self.model._symbolic_build(data_batch=batch)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            if not all(layer.built for layer in self.model._flatten_layers()):
                raise RecognitionError(
                    f"{self._name}: the model has no variables yet and cannot be built from its data: {error}",
                    hint="call the model on a batch, or model.build(input_shape), before hvdlm gets it",
                ) from error

    def _keep_fillers_out(self, feed: Feed) -> None:
        keeps = self._job.world.size > 1 and getattr(feed, "may_fill", True)
        if keeps != self._keeps_fillers_out:
            self._keeps_fillers_out = keeps
            self._forget_traces()

    def _train_step(self, data: Any) -> Any:
        """Runs while a step is traced, or eagerly."""
        own = self._own["train_step"]
        if not isinstance(data, dict) or COUNTS not in data:
            return own(data)
        counts, data = data[COUNTS], data[DATA]
        self._job.counts(counts)
        if not self._keeps_fillers_out:
            return own(data)
        variables = metric_variables(self.model)
        before = [tf.identity(v.value) for v in variables]
        result = own(data)
        for v, old in zip(variables, before, strict=True):
            v.value.assign(tf.where(counts[0] > 0, v.value, old))
        return result

    def _train_on_batch(
        self, x: Any, y: Any = None, sample_weight: Any = None, class_weight: Any = None, return_dict: bool = False
    ) -> Any:
        """A batch that all workers hold is the global batch, cut by position; others are each worker's own part."""
        own, model, job = self._own["train_on_batch"], self.model, self._job
        if not getattr(model, "compiled", False) or job.world.size == 1:
            return own(x, y, sample_weight, class_weight, return_dict)
        batch = (x, y, sample_weight)
        if not all(layer.built for layer in model._flatten_layers()) or not metrics_built(model):
            self._symbolic_build(tree.map_structure(lambda v: None if v is None else tf.convert_to_tensor(v), batch))
        self._prepare(model)
        batch, counts = cut_by_hand(batch, job)
        job.counts(counts)
        job.shares.begin()
        try:
            logs = own(*batch, class_weight, True)
        finally:
            job.uncounted()
        job.shares.end(counts[0])
        if not counts[0]:
            model.reset_metrics()  # of a sample that only keeps this worker in step
        logs = global_results(model, logs, self._own["_get_metrics_result_or_logs"], job.collectives, counts[0])
        logs = pythonify_logs(logs)
        return logs if return_dict else model._flatten_metrics_in_order(logs)

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(self._own["evaluate"]).bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        if "x" in given:
            given["x"] = original_of(given["x"])
        if not self._job.world.is_main:
            given["verbose"] = 0
        if self._in_training:
            self._job.synchronise()
        before = self._in_training, self._evaluated
        self._job.shares.disturbed()
        if not given.get("_use_cached_eval_dataset") and not given.get("kwargs"):
            part = own_part(given.get("x"), given.get("y"), given.get("sample_weight"), self._job)
            self._evaluated = None if part is None else part[-1]
            if part is not None:
                given["x"], given["y"], given["sample_weight"] = part[:-1]
        self._in_training = False
        try:
            return self._own["evaluate"](*call.args, **call.kwargs)
        finally:
            self._in_training, self._evaluated = before

    def _predict(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return self._own["predict"](original_of(x), *args, **kwargs)

    def _results(self, logs: Any) -> Any:
        """The metrics of an epoch or an evaluation; those of training are over all workers."""
        own = self._own["_get_metrics_result_or_logs"]
        job = self._job
        if job.world.size == 1 or not (self._in_training or self._evaluated is not None):
            return own(logs)
        samples = job.epoch_samples() if self._in_training else self._evaluated or 0
        return global_results(self.model, logs, own, job.collectives, samples)


def _like(original: Callable[..., Any], stand_in: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return stand_in(*args, **kwargs)

    return method


def _validation_batch_size(data: Any, batch_size: Any) -> Any:
    x, _, _ = data_adapter_utils.unpack_x_y_sample_weight(data)
    is_array = not isinstance(x, (tf.data.Dataset, keras.utils.PyDataset)) and not inspect.isgenerator(x)
    return batch_size if is_array else None
