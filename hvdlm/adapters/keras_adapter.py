"""The Keras adapter: recognises a script's objects and makes them distributed, in place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdlm.adapters.engine import start_horovod, stop_horovod
from hvdlm.adapters.keras_capture import capture, restore
from hvdlm.adapters.keras_feeds import ShardedDataset
from hvdlm.adapters.keras_job import Job
from hvdlm.adapters.keras_model import DistributedModel
from hvdlm.adapters.keras_objects import is_built, like, refuse_model, refuse_optimizer, refuse_torch, signature_of
from hvdlm.adapters.keras_optimizers import optimizers_of
from hvdlm.adapters.keras_options import refuse_options
from hvdlm.adapters.keras_reducer import ApplyWatch
from hvdlm.adapters.keras_state import (
    broadcast_variables,
    digest,
    fingerprint,
    model_variables,
    separate_streams,
)
from hvdlm.adapters.keras_statistics import GlobalStatistics, replicated
from hvdlm.adapters.keras_sync import Synchroniser
from hvdlm.adapters.keras_totals import GraphTotals
from hvdlm.adapters.keras_wire import KerasWire
from hvdlm.adapters.residuals import parted, put_together
from hvdlm.adapters.single import SingleCollectives
from hvdlm.agreement import agree
from hvdlm.algorithms.hashing import derive_seed
from hvdlm.balancing import starting_weights
from hvdlm.contracts import Collectives, Course, Fingerprint, Kind, Recorder
from hvdlm.errors import ConfigError, RecognitionError
from hvdlm.options import Options
from hvdlm.state.course import Straight
from hvdlm.state.snapshot import Snapshot
from hvdlm.world import World

__all__ = ["KerasAdapter"]

Found = Sequence[tuple[str, Kind, Any]]


class KerasAdapter:
    """See :class:`hvdlm.contracts.Adapter`."""

    name = "keras"
    data_comes_with_fit = True

    def __init__(self) -> None:
        self._wire: KerasWire | None = None
        self._job: Job | None = None
        self._pooled = False
        self._models: dict[int, tuple[str, Any, DistributedModel]] = {}
        self._optimizers: list[Any] = []
        self._sync = Synchroniser(lambda: [model for _, model, _ in self._models.values()])
        self._equal: dict[int, Any] = {}
        self._users: dict[int, tuple[Any, str]] = {}
        self._watch = ApplyWatch(self._before_apply, self._sync.applied)
        self._course: Course = Straight()
        self._statistics: GlobalStatistics | None = None
        self._datasets = 0

    def start(self, launched: bool, lost: Callable[[], bool] | None = None) -> World:
        """See :class:`hvdlm.contracts.Adapter`."""
        if not launched:
            return World.single()
        hvd, world = start_horovod("tensorflow", tf.__version__, lost)
        self._wire = KerasWire(hvd)
        return world

    def stop(self) -> None:
        """See :class:`hvdlm.contracts.Adapter`."""
        if self._wire is not None:
            stop_horovod("tensorflow")
            self._wire = None

    @property
    def collectives(self) -> Collectives:
        """See :class:`hvdlm.contracts.Adapter`."""
        return self._wire or SingleCollectives()

    def recognise(self, value: object) -> Kind | None:
        """See :class:`hvdlm.contracts.Adapter`."""
        if isinstance(value, keras.Model):
            return "model"
        if isinstance(value, keras.optimizers.Optimizer):
            return "optimizer"
        if isinstance(value, (tf.data.Dataset, keras.utils.PyDataset)):
            return "loader"
        refuse_torch(value)
        return None

    def signature(self, found: Found) -> list[str]:
        """See :class:`hvdlm.contracts.Adapter`."""
        lines = []
        for where, kind, value in found:
            if kind == "model":
                lines += signature_of(where, value)
            elif kind == "optimizer":
                lines.append(f"{where}: {type(value).__name__}")
            elif kind == "loader" and isinstance(value, tf.data.Dataset):
                lines.append(f"{where}: {int(value.cardinality())} batches of {value.element_spec}")
        return lines

    def attach(self, found: Found, options: Options, world: World, recorder: Recorder) -> list[Any]:
        """See :class:`hvdlm.contracts.Adapter`."""
        refuse_options(options, "tensorflow")
        if self._job is None:
            self._job = Job(
                options=options,
                world=world,
                collectives=self.collectives,
                recorder=recorder,
                weights=starting_weights(options, world, self.collectives),
                course=self._course,
            )
        job = self._job
        if self._wire is not None or options.prune != "none":
            self._watch.install()
        if self._wire is not None:
            if options.timings_every or options.balance == "dynamic":
                self._wire.time_steps()
            # Replicas that train on their own ask nobody at each step.
            if self._statistics is None and options.sync == "global":
                totals = GraphTotals(self._wire, job.weight)
                self._statistics = GlobalStatistics(totals, lambda: [m for _, m, _ in self._models.values()], options)
            if self._statistics is not None:
                self._statistics.install()
        for where, kind, value in found:
            if kind == "optimizer":
                refuse_optimizer(where, value)
                self._optimizers.append(value)
                broadcast_variables(value.variables, self.collectives)
        for where, kind, value in found:
            if kind == "model":
                refuse_model(where, value)
                if id(value) not in self._models:
                    self._models[id(value)] = (where, value, DistributedModel(value, where, job, self._prepare))
                if is_built(value):
                    self._prepare(value)
        replaced = []
        for where, kind, value in found:
            if kind == "loader":
                self._datasets += 1
                # The first is what the script trains on. Others (validation) are read whole, so that all ranks see the
                # same numbers; should one be trained on, its gradients are equal on all ranks and still right.
                value = ShardedDataset(value, where, job) if self._datasets == 1 else value
            replaced.append(value)
        return replaced

    def _prepare(self, model: Any) -> None:
        """Make the replicas of a model and of its optimizers equal: all variables that were not made equal before."""
        assert self._job is not None
        where = self._models[id(model)][0]
        optimizers = optimizers_of(model)
        for optimizer in optimizers:
            self._belongs(optimizer, where)
            if not optimizer.built and optimizer is model.optimizer:
                optimizer.build(model.trainable_variables)
        if is_built(model):
            self._sync.prune(where, model, self._job.options)
        if self._wire is None:
            return
        # A model may have got layers, or have been compiled again, since.
        variables = [v for v in model_variables(model) if id(v) not in self._equal]
        slots = [v for o in optimizers for v in o.variables if id(v) not in self._equal]
        if variables or slots:
            agree(self.collectives, signature_of(where, model))
            broadcast_variables([*variables, *slots], self.collectives)
            separate_streams(variables, self._job.world.rank)
            self._equal.update((id(v), v) for v in [*variables, *slots])
        for optimizer in optimizers:
            self._sync.of(optimizer, self._job, self._wire)

    def _belongs(self, optimizer: Any, where: str) -> None:
        _, owner = self._users.setdefault(id(optimizer), (optimizer, where))
        if owner != where:
            raise RecognitionError(
                f"{where} and {owner} share one optimizer, which can hold the state of one model only.",
                hint="compile each model with an optimizer of its own",
            )

    def _before_apply(self, optimizer: Any, grads: list[Any], variables: list[Any] | None) -> list[Any]:
        """What an outermost ``apply`` is to apply."""
        assert self._job is not None
        trained = {id(v) for v in (optimizer._trainable_variables if variables is None else variables)}
        owners = [(where, m) for where, m, _ in self._models.values() if any(id(v) in trained for v in m.variables)]
        if not owners and not any(o is optimizer for o in self._optimizers):
            return grads  # of a model that hvdlm was not given
        for where, model in owners if self._wire is not None else ():
            new = [v.path for v in model.variables if id(v) in trained and id(v) not in self._equal]
            if new:
                raise RecognitionError(
                    f"{where} had no {new[0]!r} yet when hvdlm got it, and is trained by a loop of its own: the "
                    "workers start from different weights.",
                    hint="call model.build(input_shape), or the model on a batch, before hvdlm gets it; after adding "
                    "layers give it to hvdlm.wrap(model) again",
                )
        return self._sync.reduce(optimizer, grads, variables, self._job, self._wire)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """See :class:`hvdlm.contracts.Adapter`."""
        if self._wire is not None:
            raise ConfigError(
                "hvdlm.no_sync() has no meaning under Keras, where applying gradients is what sends them.",
                hint="set gradient_accumulation_steps on the optimizer: gradients then travel once a cycle",
            )
        yield

    def eval_samples(self) -> int | None:
        """See :class:`hvdlm.contracts.Adapter`."""
        return None

    def randomise(self, seed: int, rank: int) -> None:
        """See :class:`hvdlm.contracts.Adapter`."""
        keras.utils.set_random_seed(derive_seed("stream", seed, rank) & 0x7FFFFFFF)

    def digest(self) -> bytes:
        """See :class:`hvdlm.contracts.Adapter`."""
        return digest(self._replicated())

    def _replicated(self) -> list[Any]:
        local = self._job is not None and self._job.options.batch_norm == "local"
        return replicated([model for _, model, _ in self._models.values()], local)

    def fingerprints(self) -> list[Fingerprint]:
        """See :class:`hvdlm.contracts.Adapter`."""
        trained = {id(v) for _, model, _ in self._models.values() for v in model.trainable_variables}
        return [Fingerprint(v.path, fingerprint(v), id(v) in trained) for v in self._replicated()]

    def resync(self, names: Sequence[str], root: int) -> None:
        """See :class:`hvdlm.contracts.Adapter`."""
        wanted = [v for v in self._replicated() if v.path in names]
        broadcast_variables([*wanted, *self._sync.slots], self.collectives, root)

    def follow(self, course: Course) -> None:
        """See :class:`hvdlm.contracts.Adapter`."""
        self._course = course

    def pool(self, whole: bool) -> None:
        """See :class:`hvdlm.contracts.Adapter`."""
        self._pooled = whole
        self._stateful()[2].pool()
        if whole:
            self._sync.pool(self.collectives)

    def capture(self, kept: Mapping[str, Any], old: Snapshot | None) -> Snapshot:
        """See :class:`hvdlm.contracts.Adapter`."""
        models, optimizers, job = self._stateful()
        kept = {**kept, **parted(self._sync.state(), job.world.size, self._pooled)}
        return capture(models, optimizers, job, kept, old)

    def restore(self, snapshot: Snapshot, whole: bool, lr_factor: float) -> dict[str, Any]:
        """See :class:`hvdlm.contracts.Adapter`."""
        models, optimizers, job = self._stateful()
        kept = restore(models, optimizers, job, snapshot, whole, lr_factor)
        self._sync.load_state(put_together(kept, job.world.size))
        return kept

    def _stateful(self) -> tuple[list[Any], list[Any], Job]:
        assert self._job is not None
        models = [model for _, model, _ in self._models.values()]
        own = {id(o): o for o in (*self._optimizers, *(o for model in models for o in optimizers_of(model)))}
        return models, list(own.values()), self._job

    def synchronised(self) -> bool:
        """See :class:`hvdlm.contracts.Adapter`."""
        return self._sync.synchronised

    def synchronise(self) -> None:
        """See :class:`hvdlm.contracts.Adapter`."""
        self._sync.synchronise()

    def number(self, value: Any) -> float:
        """See :class:`hvdlm.contracts.Adapter`."""
        return float(np.asarray(keras.ops.convert_to_numpy(value)).reshape(()))

    def like(self, value: float, example: Any) -> Any:
        """See :class:`hvdlm.contracts.Adapter`."""
        return like(value, example)

    def save(self, value: Any, path: str) -> None:
        """See :class:`hvdlm.contracts.Adapter`."""
        (value.save_weights if path.endswith(".weights.h5") else value.save)(path)

    def detach(self) -> None:
        """See :class:`hvdlm.contracts.Adapter`."""
        self._watch.remove()
        for part in (self._statistics, *(distributed for _, _, distributed in self._models.values())):
            if part is not None:
                part.remove()
