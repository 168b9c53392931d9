"""Keras on its torch backend: the torch engine makes gradients global in ``backward()``, Keras's ``fit`` is fed by it.

A Keras model is a ``torch.nn.Module`` there and its ``train_step`` calls ``backward()``, so that the torch reducer does
all there is to do before the optimizer sees a gradient. What is added is what ``fit`` needs: data, metrics, callbacks.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import torch
from keras.src.trainers.data_adapters import array_slicing
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter, can_convert_arrays
from torch.utils.data import DataLoader, TensorDataset

from hvdlm.adapters.keras_callbacks import Closing, arrange
from hvdlm.adapters.keras_metrics import global_results, metric_variables, metrics_built
from hvdlm.adapters.keras_optimizers import optimizers_of, scale_learning_rate
from hvdlm.adapters.keras_options import refuse_options
from hvdlm.adapters.keras_state import broadcast_variables
from hvdlm.adapters.keras_statistics import GlobalStatistics
from hvdlm.adapters.keras_torch_epoch import OpeningOnTorch
from hvdlm.adapters.keras_torch_totals import TorchTotals
from hvdlm.adapters.torch_adapter import TorchAdapter
from hvdlm.adapters.torch_job import Job
from hvdlm.adapters.torch_loader import ShardedLoader
from hvdlm.adapters.torch_replicas import start_alike
from hvdlm.agreement import agree
from hvdlm.contracts import Kind, Recorder
from hvdlm.errors import DataError, RecognitionError
from hvdlm.options import Options
from hvdlm.plan import Share
from hvdlm.world import World

__all__ = ["KerasTorchAdapter"]

Found = Sequence[tuple[str, Kind, Any]]


class KerasTorchAdapter(TorchAdapter):
    """See :class:`hvdlm.contracts.Adapter`."""

    name = "keras"
    data_comes_with_fit = True

    def __init__(self) -> None:
        super().__init__()
        self.options: Options | None = None
        self.world = World.single()
        self.recorder: Recorder | None = None
        self._wrapped: list[_FitOnTorch] = []
        self._samples = 0
        self._statistics: GlobalStatistics | None = None

    def recognise(self, value: object) -> Kind | None:
        """See :class:`hvdlm.contracts.Adapter`."""
        if isinstance(value, keras.Model):
            return "model"
        if isinstance(value, keras.optimizers.Optimizer):
            return "optimizer"
        return super().recognise(value)

    def signature(self, found: Found) -> list[str]:
        """See :class:`hvdlm.contracts.Adapter`."""
        return super().signature(_without_keras_optimizers(found))

    def attach(self, found: Found, options: Options, world: World, recorder: Recorder) -> list[Any]:
        """See :class:`hvdlm.contracts.Adapter`."""
        refuse_options(options, "torch")
        self.options, self.world, self.recorder = options, world, recorder
        for where, kind, value in found:
            if kind == "model" and not all(layer.built for layer in value._flatten_layers()):
                raise RecognitionError(
                    f"{where} has no variables yet.",
                    hint="give the model an Input, or call model.build(input_shape), before hvdlm gets it",
                )
        if self._wire is not None and self._statistics is None:
            self._statistics = GlobalStatistics(
                TorchTotals(self._wire, lambda: self._sync.share, size=world.size, mean=options.reduction == "mean"),
                lambda: [wrapped.model for wrapped in self._wrapped],
                options,
            )
            self._statistics.install()
            self._undo.append(self._statistics.remove)
        rest = _without_keras_optimizers(found)
        replaced = dict(zip([id(v) for _, _, v in rest], super().attach(rest, options, world, recorder), strict=True))
        for where, kind, value in found:
            if kind == "model" and isinstance(value, keras.Model):
                self._wrapped.append(_FitOnTorch(value, where, self))
            elif kind == "optimizer" and id(value) not in replaced:
                broadcast_variables(value.variables, self.collectives)
                scale_learning_rate(value, options, world)
        return [replaced.get(id(value), value) for _, _, value in found]

    def loader(self, loader: DataLoader[Any], name: str) -> ShardedLoader:
        """This worker's part of what a DataLoader reads."""
        assert self.options is not None and self.recorder is not None
        return ShardedLoader(
            loader,
            name=name,
            options=self.options,
            world=self.world,
            collectives=self.collectives,
            recorder=self.recorder,
            evaluating=self._evaluating,
            announce=self._announce,
            evaluated=self._evaluated,
            weights=self._weights or (),
            waited=lambda: getattr(self._wire, "waited", 0.0),
        )

    def attach_new(self, where: str, model: Any) -> None:
        """Take in the variables that a model got since: layers may be added and the model compiled again."""
        groups = self._sync.groups_of([(where, model)], [])
        if groups and self._wire is not None:
            assert self.options is not None and self.recorder is not None
            agree(self.collectives, super().signature([(where, "model", model)]))
            start_alike([(where, model)], [], groups, self._wire, self.world.is_main)
            self._sync.reduce(groups, [(where, model)], Job(self.options, self.world, self._wire, self.recorder))

    def _announce(self, share: Share) -> None:
        super()._announce(share)
        self._samples += share.count

    @property
    def share(self) -> Share | None:
        """What the batch that was handed out last was of its global batch."""
        return self._sync.share

    def start_epoch(self) -> None:
        """An epoch of ``fit`` begins."""
        self._samples = 0

    def epoch_samples(self) -> int:
        """Samples that counted here since the epoch began."""
        return self._samples

    def number(self, value: Any) -> float:
        """See :class:`hvdlm.contracts.Adapter`."""
        return float(np.asarray(keras.ops.convert_to_numpy(value)).reshape(()))

    def save(self, value: Any, path: str) -> None:
        """See :class:`hvdlm.contracts.Adapter`."""
        if not isinstance(value, keras.Model):
            super().save(value, path)
        elif path.endswith(".weights.h5"):
            value.save_weights(path)
        else:
            value.save(path)

    def detach(self) -> None:
        """See :class:`hvdlm.contracts.Adapter`."""
        super().detach()
        for wrapped in self._wrapped:
            wrapped.remove()


def _without_keras_optimizers(found: Found) -> list[tuple[str, Kind, Any]]:
    return [(w, k, v) for w, k, v in found if not isinstance(v, keras.optimizers.Optimizer)]


class _FitOnTorch:
    """A model's own ``fit`` and metrics, over all workers, until :meth:`remove`."""

    def __init__(self, model: Any, name: str, job: KerasTorchAdapter) -> None:
        self.model, self._name, self._job = model, name, job
        self._passes = 0
        self._scaled: set[int] = set()
        self._in_training = False
        methods = {
            "fit": self._fit,
            "evaluate": self._evaluate,
            "train_step": self._train_step,
            "_get_metrics_result_or_logs": self._results,
        }
        self._own = {method: getattr(model, method) for method in methods}
        for method, stand_in in methods.items():
            setattr(model, method, stand_in)
        model.train_function = None

    def remove(self) -> None:
        for method in self._own:
            self.model.__dict__.pop(method, None)
        self.model.train_function = None

    def _train_step(self, data: Any) -> Any:
        share = self._job.share
        if not self._in_training or share is None or not share.is_filler:
            return self._own["train_step"](data)
        # A sample that only keeps this worker in step is no part of what metrics tell.
        variables = metric_variables(self.model)
        before = [np.array(keras.ops.convert_to_numpy(v)) for v in variables]
        result = self._own["train_step"](data)
        for v, old in zip(variables, before, strict=True):
            v.assign(old)
        return result

    def _fit(self, *args: Any, **kwargs: Any) -> Any:
        model, job = self.model, self._job
        call = inspect.signature(self._own["fit"]).bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        if not getattr(model, "compiled", False):
            return self._own["fit"](*args, **kwargs)  # Keras says what is missing
        if given["validation_split"] and given["validation_data"] is None:
            arrays = (given["x"], given["y"], given["sample_weight"])
            split = array_slicing.train_validation_split(arrays, validation_split=given["validation_split"])
            (given["x"], given["y"], given["sample_weight"]), given["validation_data"] = split
            given["validation_split"] = 0.0
        if given["validation_data"] is not None:
            given["validation_batch_size"] = given["validation_batch_size"] or given["batch_size"]
        loader = self._loader(given)
        loader._epoch = max(self._passes, given["initial_epoch"])
        self._prepare(loader)
        given.update(x=loader, y=None, sample_weight=None, class_weight=None, batch_size=None, shuffle=False)
        opening = OpeningOnTorch(job, loader, whole=given["steps_per_epoch"] is None)
        arrange(given, opening=opening, closing=Closing(job, model), job=job)
        self._in_training = True
        try:
            result = self._own["fit"](*call.args, **call.kwargs)
        finally:
            self._in_training = False
            opening.remove()
            self._passes = loader._epoch
        job.collectives.allgather(b"")  # rank 0 writes files that the script may read next
        return result

    def _loader(self, given: dict[str, Any]) -> ShardedLoader:
        x = given["x"]
        if type(x) is ShardedLoader:
            return x
        if isinstance(x, DataLoader):
            return self._job.loader(x, self._name)
        if not can_convert_arrays((x, given["y"], given["sample_weight"])):
            raise DataError(
                f"{self._name}: fit was given a {type(x).__name__}, which hvdlm cannot share out on the torch backend.",
                hint="pass arrays or a torch DataLoader, or set KERAS_BACKEND=tensorflow",
            )
        adapter = ArrayDataAdapter(
            x,
            given["y"],
            sample_weight=given["sample_weight"],
            class_weight=given["class_weight"],
            batch_size=given["batch_size"],
            steps=given["steps_per_epoch"],
        )
        inputs = adapter._inputs if isinstance(adapter._inputs, tuple) else (adapter._inputs,)
        if any(isinstance(part, (list, tuple, dict)) for part in inputs):
            raise DataError(
                f"{self._name}: fit was given several inputs or targets, which need a loader on the torch backend.",
                hint="pass a torch DataLoader whose dataset yields them",
            )
        tensors = [torch.as_tensor(np.asarray(keras.ops.convert_to_numpy(part))) for part in inputs]
        dataset = TensorDataset(*(t.float() if t.dtype == torch.float64 else t for t in tensors))
        return self._job.loader(DataLoader(dataset, adapter._batch_size, shuffle=bool(given["shuffle"])), self._name)

    def _prepare(self, loader: ShardedLoader) -> None:
        """Make the variables that Keras would make from a first batch, which must not come from the plan."""
        model, job = self.model, self._job
        job.attach_new(self._name, model)
        if not metrics_built(model) or not model.optimizer.built:
            batch = next(iter(DataLoader(loader.dataset, 1, collate_fn=loader.collate_fn)))
            model._symbolic_build(data_batch=tuple(batch))
        for optimizer in optimizers_of(model):
            if id(optimizer) not in self._scaled:
                self._scaled.add(id(optimizer))
                broadcast_variables(optimizer.variables, job.collectives)
                assert job.options is not None
                scale_learning_rate(optimizer, job.options, job.world)

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        if not self._job.world.is_main and "callbacks" not in kwargs:
            kwargs["verbose"] = 0
        training, self._in_training = self._in_training, False
        try:
            return self._own["evaluate"](*args, **kwargs)
        finally:
            self._in_training = training

    def _results(self, logs: Any) -> Any:
        own = self._own["_get_metrics_result_or_logs"]
        if not self._in_training or self._job.world.size == 1:
            return own(logs)
        return global_results(self.model, logs, own, self._job.collectives, self._job.epoch_samples())
